"""Steps as graphs would replay them: of fixed shapes, in memory that stays.

What a CUDA graph does with its launches, a function that is called again does here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asyncpipe.wire.messages import Delta
from asyncpipe_workers import decode_graph, stage_memory
from asyncpipe_workers.decode_graph import Replay, Size
from asyncpipe_workers.memory.kv import KVShape, PagedKV
from tests.checkpoints import distinct_prompts, make_opt, reference_generate
from tests.families import make_family, reference_tokens
from tests.stage_chains import Chain, joining, load_chain, opened

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_TOKENS = 24


class Captured:
    """Like a CUDA graph: its output is where it was when it was captured."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, step: Replay) -> Replay:
        self.num_captured += 1
        output = step()

        def replay() -> torch.Tensor:
            self.num_replayed += 1
            return output.copy_(step())

        return replay


@pytest.fixture
def _paged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values in blocks, as on a GPU."""

    def make(shape: KVShape, *, num_blocks: int, device: torch.device) -> PagedKV:
        return PagedKV(shape, num_blocks=num_blocks, device=device)

    monkeypatch.setattr(stage_memory, "make_kv_cache", make)


def graphed_chain(path: Path, split: tuple[int, ...], capture: Captured) -> Chain:
    stages = load_chain(path, split)
    for stage in stages:
        stage.use_graphs(capture)
    return Chain(stages)


@pytest.mark.usefixtures("_paged")
@pytest.mark.parametrize("family", ["gpt2", "llama3", "mistral", "qwen3", "phi3", "gemma2"])
def test_replayed_steps_give_hugging_faces_tokens(family: str, tmp_path: Path) -> None:
    path, prompts, capture = make_family(tmp_path, family), distinct_prompts(5), Captured()
    found = graphed_chain(path, (2, 1), capture).generate(prompts, max_new_tokens=NUM_TOKENS)
    assert found == reference_tokens(path, prompts, max_new_tokens=NUM_TOKENS)
    assert capture.num_replayed > NUM_TOKENS  # most steps, of both stages


@pytest.mark.usefixtures("_paged")
def test_a_graph_serves_other_sequences_and_fewer(tmp_path: Path) -> None:
    """Five rows are padded to eight, and so are six, after some have left and others have come."""
    path, prompts, capture = make_opt(tmp_path), distinct_prompts(9), Captured()
    chain = graphed_chain(path, (4,), capture)
    expected = reference_generate(path, prompts, max_new_tokens=NUM_TOKENS)
    running, got = list(range(6)), {n: [] for n in range(9)}  # type: dict[int, list[int]]

    def step(left: tuple[int, ...] = (), joins: tuple[int, ...] = ()) -> None:
        staying = [n for n in running if n not in left]
        delta = joining(
            *(opened(n, prompts[n]) for n in joins), left=left, token_ids=tuple(got[n][-1] for n in staying if got[n])
        )
        running[:] = [*staying, *(n for n in joins if n not in staying)]
        for n, token in zip(running, chain(delta), strict=True):
            got[n].append(token)

    step(joins=tuple(running))
    for _ in range(8):
        step()
    step(left=(1, 4))
    step(joins=(6,))
    before = capture.num_replayed
    for _ in range(6):
        step()
    step(left=(0, 2), joins=(7, 8))
    step()
    assert capture.num_replayed >= before + 7
    assert all(expected[n][: len(tokens)] == tokens for n, tokens in got.items())


@pytest.mark.usefixtures("_paged")
@pytest.mark.parametrize("family", ["qwen3-moe", "phi3-long"])
def test_families_whose_shapes_depend_on_numbers_are_not_captured(family: str, tmp_path: Path) -> None:
    path, prompts, capture = make_family(tmp_path, family), distinct_prompts(3), Captured()
    graphed_chain(path, (3,), capture).generate(prompts, max_new_tokens=6)
    assert not capture.num_captured


@pytest.mark.usefixtures("_paged")
def test_what_cannot_be_captured_is_computed_step_by_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(step: Replay) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")

    path, prompts = make_opt(tmp_path), distinct_prompts(3)
    (stage,) = load_chain(path, (4,))
    stage.use_graphs(refuse)
    assert Chain([stage]).generate(prompts, max_new_tokens=8) == reference_generate(path, prompts, max_new_tokens=8)
    assert sum("cannot be captured" in record.message for record in caplog.records) == 1


def test_sequences_of_a_cpu_are_not_captured(tmp_path: Path) -> None:
    """Their keys and values are where no table says."""
    capture = Captured()
    chain = graphed_chain(make_opt(tmp_path), (4,), capture)
    tokens = chain(joining(opened(0, [5, 6, 7])))
    for _ in range(decode_graph.CAPTURE_AT + 1):
        tokens = chain(Delta(token_ids=tokens))
    assert not capture.num_captured


def test_sizes_are_powers_of_two() -> None:
    assert [Size.of(n, 1).rows for n in (1, 2, 3, 5, 8, 9)] == [1, 2, 4, 8, 8, 16]
