"""From memory budgets to a policy's percentages. Pure.

The device's budget is given away in this order: working memory, activations, weights, keys and values (`demand` defines them).

1. If all of it fits, all is on the device, and no buffers are needed.
2. If all weights fit beside the workspace for keys and values, the rest is for keys and values.
3. Otherwise weights get what working memory (now with buffers for weights) and activations leave, but never all of them stay;
   keys and values go elsewhere.
4. If not even activations fit beside working memory, they are on the host, and nothing else is on the device.

What is not on the device goes to the host in the same order: activations, weights, keys and values. Where that is too much,
the host first keeps buffers as large as the device's, through which the disk's bytes pass; the rest is on disk. So more memory
never gives a smaller share to the device, and the bytes of the percentages never exceed the budgets: a share is cut to
hundredths of a percent, and a row of the widest matrix is kept back for shares that end within one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from asyncpipe.errors import Invalid
from asyncpipe.policy import Policy
from asyncpipe_coordinator.planner.demand import StageDemand

WHOLE = 10_000  # percentages are in hundredths here
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes of one stage. `host` None: there is room for all."""

    device: int
    host: int | None = None


@dataclass(frozen=True, slots=True)
class _OnDevice:
    """Hundredths of a percent on the device."""

    weights: int
    cache: int
    activations: int


def derive_policy(*, demand: StageDemand, budget: Budget, base: Policy) -> Policy:
    """`base` with percentages that fit into `budget`; its other fields are what `demand` was counted for.

    Its placement is exact: whole tensors could not keep to a budget.
    Raises Invalid, with the least that is needed, when working memory does not fit.
    """
    device = _on_device(demand, budget, base)
    host_weights, host_cache = _on_host(demand, budget, device)
    return replace(
        base,
        w_gpu_percent=device.weights / 100,
        w_cpu_percent=host_weights / 100,
        cache_gpu_percent=device.cache / 100,
        cache_cpu_percent=host_cache / 100,
        act_gpu_percent=device.activations / 100,
        act_cpu_percent=(WHOLE - device.activations) / 100,
    )


def least_device_bytes(demand: StageDemand, base: Policy) -> int:
    """With less, nothing fits. Few layers may take less than the buffers to stream them."""
    return min(_bytes_for_all(demand, base), _bytes_for_weights(demand, base), _bytes_to_stream(demand))


def _bytes_for_all(demand: StageDemand, base: Policy) -> int:
    workspace = demand.cache_workspace if base.compress_cache else 0
    return _bytes_for_weights(demand, base) - demand.cache_workspace + workspace + demand.cache


def _bytes_for_weights(demand: StageDemand, base: Policy) -> int:
    """With no keys and values on the device."""
    unpacking = demand.weight_buffers if base.compress_weight else 0
    return _bytes_to_stream(demand) - demand.weight_buffers + unpacking + demand.activations + demand.resident_weights


def _bytes_to_stream(demand: StageDemand) -> int:
    """With nothing at all but working memory."""
    return demand.compute + demand.rounding + demand.cache_workspace + demand.weight_buffers


def _on_device(demand: StageDemand, budget: Budget, base: Policy) -> _OnDevice:
    if budget.device >= _bytes_for_all(demand, base):
        return _OnDevice(WHOLE, WHOLE, WHOLE)
    room = budget.device - _bytes_for_weights(demand, base)
    if room >= 0:
        return _OnDevice(WHOLE, _share(room, demand.cache), WHOLE)
    room = budget.device - _bytes_to_stream(demand) - demand.activations
    if room >= 0:
        return _OnDevice(min(_share(room, demand.weights), WHOLE - 1), 0, WHOLE)
    least = least_device_bytes(demand, base)
    if budget.device < _bytes_to_stream(demand):
        raise Invalid(
            f"--device-memory {_mib(budget.device)} is too little: working memory alone takes {_mib(least)}; give at least"
            " that, or use a smaller --gpu-batch-size or --max-step-tokens"
        )
    return _OnDevice(0, 0, 0)


def _on_host(demand: StageDemand, budget: Budget, device: _OnDevice) -> tuple[int, int]:
    """Weights, and keys and values, in hundredths of a percent."""
    weights, cache = WHOLE - device.weights, WHOLE - device.cache
    activations = 0 if device.activations else demand.activations
    weight_bytes, cache_bytes = _bytes_of(weights, demand.weights), _bytes_of(cache, demand.cache)
    everything = activations + weight_bytes + cache_bytes + (demand.rounding if weight_bytes else 0)
    if budget.host is None or everything <= budget.host:
        return weights, cache
    least = activations + demand.weight_buffers + demand.cache_workspace + demand.rounding
    room = budget.host - least
    if room < 0:
        raise Invalid(
            f"--host-memory {_mib(budget.host)} is too little: what passes through the host on its way from the disk takes"
            f" {_mib(least)}; give at least that"
        )
    if weight_bytes > room:
        return _share(room, demand.weights), 0
    return weights, min(_share(room - weight_bytes, demand.cache), cache)


def _share(part: int, whole: int) -> int:
    """At most all, rounded down."""
    return min(part * WHOLE // whole, WHOLE)


def _bytes_of(share: int, whole: int) -> int:
    return -(-whole * share // WHOLE)


def _mib(num_bytes: int) -> str:
    """Rounded up, and written as the flag takes it."""
    return f"{-(-num_bytes // MIB)}MiB"
