"""Where bytes live, in words for people and as JSON."""

from __future__ import annotations

from typing import Any

from asyncpipe.policy import Policy, Shares
from asyncpipe.wire.messages import StageStatus, TierBytes, TierReport

TIERS = ("device", "host", "disk")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size_text(num_bytes: int) -> str:
    """ "1.2 GiB"; whole numbers below a KiB."""
    value, unit = float(num_bytes), 0
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{num_bytes} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def tiers_text(report: TierReport) -> str:
    """ "weights 20.0 % device (1.2 GiB), 80.0 % host (4.8 GiB); cache 100.0 % host (3.0 GiB)"; empty if there is nothing."""
    parts = [
        _bytes_text(name, value)
        for name, value in (("weights", report.weights), ("cache", report.cache), ("activations", report.activations))
        if value.total
    ]
    return "; ".join(parts + ([f"buffers {size_text(report.buffers)}"] if report.buffers else []))


def transfers_text(stage: StageStatus) -> str:
    """ "12.0 GiB moved between tiers, waited 3.2 s for them"; empty if nothing moved."""
    return (
        f"{size_text(stage.transfers.num_bytes)} moved between tiers, waited {stage.transfers.wait_s:.1f} s for them"
        if stage.transfers.num_bytes
        else ""
    )


def policy_text(policy: Policy) -> str:
    """ "weights 20 % device, 80 % host; cache 100 % host; activations 100 % device"."""
    parts = (("weights", policy.weights), ("cache", policy.cache), ("activations", policy.activations))
    return "; ".join(f"{name} {_shares_text(shares)}" for name, shares in parts)


def tiers_object(stage: StageStatus) -> dict[str, Any]:
    """What was asked for and where the bytes are."""
    policy, report = stage.policy, stage.tiers
    return {
        "weights": _placed_object(policy.weights, report.weights),
        "cache": _placed_object(policy.cache, report.cache),
        "activations": _placed_object(policy.activations, report.activations),
        "buffer_bytes": report.buffers,
    }


def _placed_object(shares: Shares, found: TierBytes) -> dict[str, Any]:
    return {
        "requested_percent": {tier: round(getattr(shares, tier), 4) for tier in TIERS},
        "bytes": {tier: getattr(found, tier) for tier in TIERS},
    }


def _bytes_text(name: str, found: TierBytes) -> str:
    """Shares of the bytes, as they are."""
    shares = [
        f"{100 * num_bytes / found.total:.1f} % {tier} ({size_text(num_bytes)})"
        for tier in TIERS
        if (num_bytes := getattr(found, tier))
    ]
    return f"{name} {', '.join(shares)}"


def _shares_text(shares: Shares) -> str:
    return ", ".join(f"{percent:g} % {tier}" for tier in TIERS if (percent := getattr(shares, tier)))
