"""How a benchmark takes turns, and says what it found."""

from __future__ import annotations

import json
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

Once = Callable[[], Awaitable[float]]
"""One measurement, in whatever unit."""


async def in_turn(rounds: Mapping[str, Mapping[str, Once]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """For each thing measured, everybody in turn, `repeats` times, after one turn that does not count."""
    results: dict[str, dict[str, list[float]]] = {what: {who: [] for who in whos} for what, whos in rounds.items()}
    with tqdm(total=(repeats + 1) * sum(map(len, rounds.values())), unit="round", disable=None) as bar:
        for what, whos in rounds.items():
            for repeat in range(repeats + 1):
                for who, once in whos.items():
                    value = await once()
                    if repeat:
                        results[what][who].append(value)
                    bar.update()
    return results


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Of the ratios round by round."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


def print_result(result: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name:28} {value}")
