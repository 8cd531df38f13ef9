"""What `peers.py` found: medians, ratios round by round, tables and a picture."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peer_cases import CASES, LONG_PROMPT_LEN, NEW_TOKENS, PREFILL, PROMPT_LEN, THREADS, Case, Workload
from peer_engines import Timing

PACKAGES = ("asyncpipe-runtime", "torch", "transformers", "ctranslate2", "llama-cpp-python")
COLORS = {"ours": "#2b6cb0", "hf": "#dd6b20", "ct2": "#2f855a", "llamacpp": "#b83280"}
ENGINE_NAMES = {"ours": "asyncpipe", "hf": "Hugging Face", "ct2": "CTranslate2", "llamacpp": "llama.cpp"}


class Rates(NamedTuple):
    """Tokens per second: of the prompts, of all sequences together in a decode step, and of all that was generated over all of
    the time."""

    prefill: float
    decode: float
    end_to_end: float


PHASES = Rates._fields


def rates(timing: Timing, workload: Workload) -> Rates:
    batch = workload.batch
    return Rates(
        prefill=batch * workload.prompt_len / timing.first_s,
        decode=batch / timing.step_s if timing.step_s else 0.0,
        end_to_end=batch * workload.new_tokens / timing.total_s,
    )


class Findings:
    """Of one model, whose weights are stored in `dtype`."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self._rounds: dict[tuple[str, Workload], dict[int, Rates]] = defaultdict(dict)
        self.reasons: dict[str, str] = {}  # of what there is no figure for: a case, or a case and a workload

    def add(self, case: Case, workload: Workload, *, number: int, timing: Timing) -> None:
        self._rounds[case.name, workload][number] = rates(timing, workload)

    def is_hopeless(self, case: Case, workload: Workload) -> bool:
        return case.name in self.reasons or f"{case.name}_{workload.name}" in self.reasons

    def workloads(self) -> list[Workload]:
        """Those that were measured, in order."""
        return sorted({workload for _, workload in self._rounds}, key=lambda workload: (workload == PREFILL, workload.batch))

    def medians(self, workload: Workload) -> dict[str, Rates]:
        """By case, in the order of CASES."""
        found = {name: self._rounds[name, workload] for name in CASES if (name, workload) in self._rounds}
        return {name: Rates(*map(statistics.median, zip(*rounds.values(), strict=True))) for name, rounds in found.items()}

    def num_rounds(self, name: str, workload: Workload) -> int:
        return len(self._rounds[name, workload])

    def ratio(self, above: str, below: str, workload: Workload, phase: str) -> float | None:
        """The median of the ratios round by round; None without a round that has both."""
        ours, theirs = self._rounds.get((above, workload), {}), self._rounds.get((below, workload), {})
        found = [getattr(ours[number], phase) / getattr(theirs[number], phase) for number in ours.keys() & theirs.keys()]
        return round(statistics.median(found), 3) if found else None

    def ratios(self, workload: Workload, phase: str) -> dict[tuple[str, str], float]:
        """By case above and case below: ours over each peer, and ours in two stages over ours in one."""
        pairs = (
            (above, below) for above in CASES.values() for below in CASES.values() if above.is_ours and _compares(above, below)
        )
        found = {(above.name, below.name): self.ratio(above.name, below.name, workload, phase) for above, below in pairs}
        return {pair: ratio for pair, ratio in found.items() if ratio is not None}


def _compares(above: Case, below: Case) -> bool:
    same = above.precision == below.precision and (above.stages, below.stages) == (2, 1)
    return same if below.is_ours else True


# --- as JSON ----------------------------------------------------------------------------------------------------------


def as_json(found: Mapping[str, Findings], *, rounds: int) -> dict[str, Any]:
    return {
        "ratios": {model: _ratios(findings, "decode") for model, findings in found.items()},
        "prefill_ratios": {model: _ratios(findings, "prefill") for model, findings in found.items()},
        "end_to_end_ratios": {model: _ratios(findings, "end_to_end") for model, findings in found.items()},
        "prefill": {
            "prompt_tokens": LONG_PROMPT_LEN,
            "ratios": {
                model: {f"{above}/{below}": ratio for (above, below), ratio in findings.ratios(PREFILL, "prefill").items()}
                for model, findings in found.items()
            },
            "first_token_s": {
                model: {name: round(LONG_PROMPT_LEN / rate.prefill, 4) for name, rate in findings.medians(PREFILL).items()}
                for model, findings in found.items()
            },
        },
        "tokens_per_s": {model: _medians(findings) for model, findings in found.items()},
        "not_measured": {model: findings.reasons for model, findings in found.items()},
        "stored": {model: findings.dtype for model, findings in found.items()},
        "prompt_tokens": PROMPT_LEN,
        "new_tokens": NEW_TOKENS,
        "rounds": rounds,
        "threads": THREADS,
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def _ratios(findings: Findings, phase: str) -> dict[str, float]:
    return {
        f"{above}_{workload.name}/{below}_{workload.name}": ratio
        for workload in findings.workloads()
        if workload != PREFILL
        for (above, below), ratio in findings.ratios(workload, phase).items()
    }


def _medians(findings: Findings) -> dict[str, dict[str, float]]:
    return {
        f"{name}_{workload.name}": {phase: round(rate, 2) for phase, rate in median._asdict().items()}
        | {"rounds": findings.num_rounds(name, workload)}
        for workload in findings.workloads()
        if workload != PREFILL
        for name, median in findings.medians(workload).items()
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- as text ----------------------------------------------------------------------------------------------------------


def as_text(found: Mapping[str, Findings], *, rounds: int) -> str:
    lines = [f"{processor()}, {THREADS} threads, {rounds} rounds; prompts of {PROMPT_LEN}, {NEW_TOKENS} new tokens each", ""]
    for model, findings in found.items():
        lines += [f"{model}, stored in {findings.dtype}", ""]
        for workload in findings.workloads():
            lines += [*_prefill_lines(model, findings), ""] if workload == PREFILL else [*_lines(model, findings, workload), ""]
        lines += [f"{model}: no figures for {name}: {reason}" for name, reason in findings.reasons.items()]
    return "\n".join(lines)


def _lines(model: str, findings: Findings, workload: Workload) -> Iterator[str]:
    yield from _table(
        [f"{model}, batch {workload.batch}: tokens/s", *PHASES],
        [[name, *(f"{rate:.1f}" for rate in median)] for name, median in findings.medians(workload).items()],
    )
    yield from _ratio_table(f"{model}, batch {workload.batch}: decode, row/column", findings.ratios(workload, "decode"))


def _prefill_lines(model: str, findings: Findings) -> Iterator[str]:
    medians = findings.medians(PREFILL)
    yield from _table(
        [f"{model}, one prompt of {LONG_PROMPT_LEN}", "first token, s", "tokens/s"],
        [[name, f"{LONG_PROMPT_LEN / rate.prefill:.3f}", f"{rate.prefill:.1f}"] for name, rate in medians.items()],
    )
    yield from _ratio_table(f"{model}, one prompt: row/column", findings.ratios(PREFILL, "prefill"))


def _ratio_table(title: str, ratios: Mapping[tuple[str, str], float]) -> Iterator[str]:
    below = list(dict.fromkeys(name for _, name in ratios))
    rows = [
        [above, *(f"{ratios[above, name]:.2f}" if (above, name) in ratios else "" for name in below)]
        for above in dict.fromkeys(name for name, _ in ratios)
    ]
    if rows:
        yield ""
        yield from _table([title, *below], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """In Markdown, aligned: the first column to the left, figures to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def align(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return " | ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)])

    yield f"| {align(header)} |"
    yield f"|{'-' * (widths[0] + 2)}|{'|'.join('-' * (width + 1) + ':' for width in widths[1:])}|"
    yield from (f"| {align(row)} |" for row in rows)


# --- as a picture -----------------------------------------------------------------------------------------------------


def draw(found: Mapping[str, Findings], path: Path) -> None:
    """Decoded tokens per second: a row for each model, a column for each batch."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    batches = list(dict.fromkeys(w for findings in found.values() for w in findings.workloads() if w != PREFILL))
    num_bars = [max((len(findings.medians(workload)) for workload in batches), default=0) for findings in found.values()]
    figure = Figure(figsize=(3.4 * len(batches) + 1.2, 1.0 + 0.24 * sum(num_bars) + 0.6 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(batches), squeeze=False, height_ratios=[max(count, 1) for count in num_bars])
    for row, (model, findings) in zip(axes, found.items(), strict=True):
        for axis, workload in zip(row, batches, strict=True):
            _draw_bars(axis, findings.medians(workload), title=f"{model}, batch {workload.batch}")
            axis.tick_params(labelleft=axis is row[0])
    for axis in axes[-1]:
        axis.set_xlabel("decoded tokens/s")
    engines = dict.fromkeys(CASES[name].engine for f in found.values() for w in batches for name in f.medians(w))
    figure.legend(
        handles=[Patch(color=COLORS[engine], label=ENGINE_NAMES[engine]) for engine in engines],
        loc="outside lower center",
        ncols=len(COLORS),
        frameon=False,
    )
    figure.savefig(path, dpi=120)


def _draw_bars(axis: Any, medians: Mapping[str, Rates], *, title: str) -> None:
    labels = [f"{ENGINE_NAMES[CASES[name].engine]} {name.partition('_')[2].replace('_2x1', ', 2 stages')}" for name in medians]
    bars = axis.barh(labels, [rate.decode for rate in medians.values()], color=[COLORS[CASES[name].engine] for name in medians])
    axis.bar_label(bars, fmt=lambda rate: f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}", padding=2, fontsize=7)
    axis.set_title(title, loc="left", fontsize=10)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.15)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
