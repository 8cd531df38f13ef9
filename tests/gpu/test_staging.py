"""Tensors on their way between a card and messages."""

from __future__ import annotations

import torch

from asyncpipe_workers.staging import StagingRing
from tests.contract.link_peers import numbers


def test_staging_gives_what_was_computed_without_waiting_for_the_device(card: torch.device) -> None:
    ring = StagingRing(card, num_buffers=2, buffer_bytes=1 << 20)
    expected = [numbers(100, 64, seed=seed, dtype=torch.bfloat16) for seed in range(5)]
    for round_trip in range(3):
        for tensor in expected:
            copy = ring.to_host(tensor.to(card))
            copy.wait()
            assert torch.equal(ring.to_device(copy.tensor).cpu(), tensor), f"round {round_trip}"
            del copy
    assert ring.statistics().num_unstaged == 0


def test_what_finds_no_staging_buffer_is_copied_all_the_same(card: torch.device) -> None:
    ring = StagingRing(card, num_buffers=1, buffer_bytes=1 << 10)
    first, second = (ring.to_host(numbers(16, seed=seed).to(card)) for seed in (1, 2))
    for copy, seed in ((first, 1), (second, 2)):
        copy.wait()
        assert torch.equal(ring.to_device(copy.tensor).cpu(), numbers(16, seed=seed))
    large = numbers(4096)
    assert torch.equal(ring.to_device(ring.to_host(large.to(card)).tensor).cpu(), large)
    assert ring.statistics().num_unstaged == 5
