"""Percentages become bytes: exactly, or by FlexLLMGen's rule and with its errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncpipe.policy import Placement, Shares
from asyncpipe_workers.memory.placement import Rows, Sized, place
from asyncpipe_workers.memory.shares import Apportionment, Counts

TIERS = range(3)


@st.composite
def shares(draw: st.DrawFn) -> Shares:
    device = draw(st.integers(0, 100))
    host = draw(st.integers(0, 100 - device))
    return Shares(float(device), float(host), float(100 - device - host))


@st.composite
def layers(draw: st.DrawFn) -> list[list[Sized]]:
    """Layers of matrices and vectors, as models have them."""
    hidden = draw(st.sampled_from([32, 64, 768]))
    groups = []
    for layer in range(draw(st.integers(1, 6))):
        matrices = [Sized(f"{layer}.m{n}.weight", hidden * times, hidden * 4) for n, times in enumerate((1, 1, 1, 1))]
        vectors = [Sized(f"{layer}.m{n}.bias", 1, hidden * 4) for n in range(4)]
        groups.append(matrices + vectors)
        groups.append([Sized(f"{layer}.fc1.weight", hidden * 4, hidden * 4), Sized(f"{layer}.fc2.weight", hidden, hidden * 16)])
    return groups


def bytes_per_tier(groups: list[list[Sized]], placed: dict[str, Rows]) -> list[int]:
    totals = [0, 0, 0]
    for tensor in (tensor for group in groups for tensor in group):
        device, host = placed[tensor.name]
        for tier, rows in enumerate((device, host, tensor.num_rows - device - host)):
            assert rows >= 0
            totals[tier] += rows * tensor.row_bytes
    return totals


@given(layers(), shares())
def test_exact_placement_is_within_one_percent(groups: list[list[Sized]], wanted: Shares) -> None:
    totals = bytes_per_tier(groups, place(groups, wanted, Placement.EXACT))
    for tier in TIERS:
        assert abs(100 * totals[tier] / sum(totals) - wanted[tier]) < 1.0


@given(layers(), shares())
def test_every_layer_has_nearly_its_share(groups: list[list[Sized]], wanted: Shares) -> None:
    """So that no layer takes much longer to load than others."""
    placed = place(groups, wanted, Placement.EXACT)
    largest_row = max(tensor.row_bytes for group in groups for tensor in group)
    for group in groups:
        totals = bytes_per_tier([group], placed)
        for tier in TIERS:
            assert abs(totals[tier] - wanted[tier] / 100 * sum(totals)) <= 2.5 * largest_row + 1


FLEXLLMGEN = [  # requested % on the GPU (rest on the CPU), and what OPT-30B's layers realise, from its rule
    (0, 0.0),
    (12, 0.0),
    (20, 8.3),
    (25, 8.3),
    (30, 41.7),
    (50, 50.0),
    (70, 58.3),
    (80, 91.7),
    (88, 100.0),
]


@pytest.mark.parametrize(("requested", "realised"), FLEXLLMGEN)
def test_flexllmgens_rule_places_whole_tensors_with_its_errors(requested: float, realised: float) -> None:
    hidden = 7168
    names = [f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")]
    attention = [Sized(f"{name}.weight", hidden, 2 * hidden) for name in names]
    attention += [Sized(f"{name}.bias", 1, 2 * hidden) for name in names]
    attention += [Sized(f"self_attn_layer_norm.{part}", 1, 2 * hidden) for part in ("weight", "bias")]
    feed_forward = [
        Sized("fc1.weight", 4 * hidden, 2 * hidden),
        Sized("fc1.bias", 1, 8 * hidden),
        Sized("fc2.weight", hidden, 8 * hidden),
        Sized("fc2.bias", 1, 2 * hidden),
        *(Sized(f"final_layer_norm.{part}", 1, 2 * hidden) for part in ("weight", "bias")),
    ]
    groups = [attention, feed_forward]
    totals = bytes_per_tier(groups, place(groups, Shares(requested, 100.0 - requested, 0.0), Placement.FLEXLLMGEN))
    assert 100 * totals[0] / sum(totals) == pytest.approx(realised, abs=0.1)


@given(shares(), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=60), st.sets(st.integers(0, 9)))
def test_tokens_are_shared_out_to_a_few_rows(wanted: Shares, growth: list[tuple[int, int]], ended: set[int]) -> None:
    split = Apportionment(wanted)
    sequences = [Counts()] * 10
    for number, more in growth:
        added = split.extend(sequences[number], more)
        assert sum(added) == more
        assert min(added) >= 0
        sequences[number] = sequences[number].plus(added)
        assert all(count <= most + 1 for count, most in zip(sequences[number], split.most(sum(sequences[number])), strict=True))
    everyone = split.total
    for tier in TIERS:
        assert abs(everyone[tier] - wanted[tier] / 100 * sum(everyone)) <= 6
        for sequence in sequences:
            assert abs(sequence[tier] - wanted[tier] / 100 * sum(sequence)) < 2
    for number in ended:
        split.remove(sequences[number])
    left = [sequence for number, sequence in enumerate(sequences) if number not in ended]
    assert split.total == Counts(*(sum(sequence[tier] for sequence in left) for tier in TIERS))
