"""Steps that are replayed from a tape give what steps that are computed call by call give, to the last bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncpipe.wire.messages import Delta
from asyncpipe_workers import decode_tape, layout, stage_model
from asyncpipe_workers.decode_tape import DecodeTapes, TapedSweep
from asyncpipe_workers.sampling import Sampled
from asyncpipe_workers.stage_model import StageModel
from asyncpipe_workers.tape import OtherCalls, Tape, TapeMemory, new_tensor, recording
from tests.checkpoints import distinct_prompts, make_opt
from tests.families import make_family
from tests.stage_chains import Chain, joining, load_chain, opened

# Sizes for which there are kernels all the way.
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64}
OPT = {"hidden_size": 64, "num_attention_heads": 2, "word_embed_proj_dim": 64, "ffn_dim": 128}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
GPT2 = {"n_embd": 64, "n_head": 2}

MODELS: dict[str, Callable[[Path], Path]] = {
    "opt": lambda path: make_opt(path, layers=3, **OPT),
    "gpt2": lambda path: make_family(path, "gpt2", **GPT2),
    "llama": lambda path: make_family(path, "llama3", **HEADS),
    "sizes that fill no panel": lambda path: make_family(path, "llama", **(HEADS | {"intermediate_size": 48})),
    "longrope": lambda path: make_family(path, "phi3-long", **(HEADS | {"rope_parameters": LONG})),
    "windows": lambda path: make_family(path, "mistral", **HEADS),
    "exact gelu, scaled queries": lambda path: make_family(path, "gpt2-scaled", **GPT2, activation_function="gelu"),
    "caps, scaled queries": lambda path: make_family(path, "gemma2", **HEADS),
    "two ropes": lambda path: make_family(path, "gemma3", **HEADS),
    "experts for two rows": lambda path: make_family(path, "mixtral", **HEADS, num_local_experts=4),
    "many experts": lambda path: make_family(path, "qwen3-moe", **HEADS | EXPERTS),
    "head norms": lambda path: make_family(path, "qwen3", **HEADS),
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0 + 0.1 * n for n in range(16)],
    "long_factor": [1.5 + 0.2 * n for n in range(16)],
    "original_max_position_embeddings": 48,
}
UNKNOWN: dict[str, Callable[[Path], Path]] = {
    "an activation without a kernel": lambda path: make_family(path, "gpt2", **GPT2, activation_function="tanh"),
}

pytestmark = pytest.mark.usefixtures("compiled_kernels")


def taped(stage: StageModel) -> DecodeTapes:
    assert isinstance(stage._sweep, TapedSweep)
    return stage._sweep._tapes


def sizes_of_tapes(stage: StageModel) -> set[int]:
    return {num_rows for num_rows, _ in taped(stage)._tapes}


def steps(stages: list[StageModel], deltas: list[Delta], monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Logits of each; tokens do not depend on them."""
    seen: list[torch.Tensor] = []

    def sample(logits: torch.Tensor, samplers: Any) -> Sampled:
        seen.append(logits.clone())
        return Sampled(tuple(10 + len(seen) + row for row in range(len(logits))))

    chain = Chain(stages)
    with monkeypatch.context() as patch:
        patch.setattr(stage_model, "sample", sample)
        for delta in deltas:
            chain(delta)
    return seen


def going_on(num: int, *, times: int = 1) -> list[Delta]:
    return [Delta(token_ids=tuple(20 + time + n for n in range(num))) for time in range(times)]


def both_ways(
    path: Path, split: tuple[int, ...], deltas: list[Delta], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[StageModel]]:
    """Logits with tapes and without, and the stages that have them."""
    stages = load_chain(path, split)
    with monkeypatch.context() as patch:
        patch.setenv(decode_tape.SWITCH, "0")
        plain = load_chain(path, split)
    assert not any(isinstance(stage._sweep, TapedSweep) for stage in plain)
    return steps(stages, deltas, monkeypatch), steps(plain, deltas, monkeypatch), stages


@pytest.mark.parametrize("split", [(3,), (1, 2)])
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_steps_call_by_call(
    model: str, split: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While sequences come and go, and become longer than a tape has room for."""
    monkeypatch.setattr(layout, "SCRATCH_TOKENS", 16)
    prompts = distinct_prompts(5, longest=70)
    deltas = [
        joining(*(opened(n, prompts[n]) for n in range(3))),
        *going_on(3, times=6),
        joining(opened(3, prompts[3]), left=(1,), token_ids=(7, 8)),
        *going_on(3, times=20),
        joining(opened(4, prompts[4]), token_ids=(7, 8, 9)),
        *going_on(4, times=3),
        Delta(left=(0, 2), token_ids=(9, 10)),
        *going_on(2, times=3),
    ]
    found, expected, stages = both_ways(MODELS[model](tmp_path), split, deltas, monkeypatch)
    assert len(found) == len(expected) == len(deltas)
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))
    assert all(taped(stage)._tapes for stage in stages), "tapes were recorded"


@pytest.mark.parametrize("model", UNKNOWN)
def test_what_is_not_all_kernels_is_computed_call_by_call(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = [joining(*(opened(n, prompt) for n, prompt in enumerate(distinct_prompts(3)))), *going_on(3, times=4)]
    found, expected, (stage,) = both_ways(UNKNOWN[model](tmp_path), (3,), deltas, monkeypatch)
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))
    assert taped(stage)._most_rows < 3
    assert not taped(stage)._tapes


def test_each_number_of_threads_has_tapes_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beginning = joining(*(opened(n, prompt) for n, prompt in enumerate(distinct_prompts(2))))
    deltas = going_on(2, times=8)
    path, before = MODELS["llama"](tmp_path), torch.get_num_threads()
    _, *expected = steps(load_chain(path, (3,)), [beginning, *deltas], monkeypatch)
    (stage,) = load_chain(path, (3,))
    steps([stage], [beginning], monkeypatch)
    found: list[torch.Tensor] = []
    try:
        for num_threads in (3, 1, 3, 2):  # the first needs most memory
            stage.use_threads(num_threads)
            found += steps([stage], [deltas.pop(0), deltas.pop(0)], monkeypatch)
    finally:
        torch.set_num_threads(before)
    assert sorted(taped(stage)._tapes) == [(2, 1), (2, 2), (2, 3)]
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))


def test_a_steady_step_calls_no_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (stage,) = load_chain(MODELS["llama"](tmp_path), (3,))
    calls: list[int] = []
    tapes = taped(stage)
    tapes._layers = [lambda *step, layer=layer: (calls.append(1), layer(*step))[1] for layer in tapes._layers]
    prompts = distinct_prompts(2)
    steps([stage], [joining(*(opened(n, prompt) for n, prompt in enumerate(prompts))), *going_on(2, times=2)], monkeypatch)
    assert len(calls) == 2 * len(tapes._layers), "once to see what layers ask for, once to record; prompts are not taped"
    steps([stage], going_on(2, times=5), monkeypatch)
    assert len(calls) == 2 * len(tapes._layers)


def test_hidden_states_that_were_given_away_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one micro-batch, while the next is computed with the same tape."""
    first, _ = load_chain(MODELS["llama"](tmp_path), (2, 1))
    given: list[torch.Tensor] = []
    sweep = first._sweep

    class Kept:
        def run(self, works: Any) -> Any:
            for result in sweep.run(works):
                given.append(result.output)
                yield result

    first._sweep = Kept()  # type: ignore[assignment]
    chain = Chain([first])
    for micro_batch in range(2):
        chain(joining(opened(micro_batch, distinct_prompts(2)[micro_batch])), micro_batch)
    copies = []
    for time in range(4):
        for micro_batch in range(2):
            chain(Delta(token_ids=(30 + time,)), micro_batch)
            copies.append(given[-1].clone())
    assert all(torch.equal(*both) for both in zip(given[2:], copies, strict=True))


@given(
    model=st.sampled_from(["opt", "windows"]),
    script=st.lists(st.sampled_from(["go on", "join", "leave"]), min_size=3, max_size=25),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_script_gives_the_same_logits(
    model: str, script: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / model
    if not path.is_dir():
        MODELS[model](path)
    monkeypatch.setattr(layout, "SCRATCH_TOKENS", 16)
    running, number, deltas = [0], 1, [joining(opened(0, [5, 6, 7]))]
    for what in script:
        tokens = [20 + len(deltas) + n for n in running]
        if what == "join" and len(running) < 12:
            deltas.append(joining(opened(number, [8 + number % 9] * (1 + number)), token_ids=tuple(tokens)))
            running.append(number)
            number += 1
        elif what == "leave" and len(running) > 1:
            gone = running.pop(len(deltas) % len(running))
            deltas.append(Delta(left=(gone,), token_ids=tuple(tokens[: len(running)])))
        else:
            deltas.append(Delta(token_ids=tuple(tokens)))
    found, expected, _ = both_ways(path, (3,), deltas, monkeypatch)
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "is_other"),
    [
        (lambda x: x.view(2, 8)[:, 3:].unbind(1), False),
        (lambda x: x.reshape(2, 8).chunk(2), False),
        (lambda x: x.float().contiguous(), False),
        (lambda x: torch.empty(4), False),
        (lambda x: x.add_(1), True),
        (lambda x: x.view(4, 4).t().reshape(-1), True),
        (lambda x: x.view(4, 4).t().contiguous(), True),
        (lambda x: x.to(torch.bfloat16), True),
        (lambda x: x + 1, True),
        (lambda x: x[0].item(), True),
        (lambda x: torch.tensor([1, 2]), True),
    ],
)
def test_other_calls_are_all_that_computes(compute: Callable[[torch.Tensor], Any], is_other: bool) -> None:
    with torch.inference_mode(), OtherCalls() as others:
        compute(torch.empty(16))
    assert bool(others.found) == is_other, others.found


def test_memory_is_used_again_by_every_other_part() -> None:
    memory = TapeMemory()
    places = []
    with recording(Tape(memory)):
        for _ in range(4):
            memory.begin_part()
            places.append([new_tensor(3, 5).data_ptr(), new_tensor(7).data_ptr()])
    assert places[0] == places[2]
    assert places[1] == places[3]
    assert len({place for part in places for place in part}) == 4
    assert memory.num_bytes == 2 * 4 * (15 + 7)
    assert new_tensor(3).data_ptr() not in places[0], "nothing is recorded any more"


def test_tapes_of_other_sizes_go_when_memory_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would keep what it was recorded with."""
    (stage,) = load_chain(MODELS["llama"](tmp_path), (3,))
    steps([stage], [joining(opened(0, [5, 6])), *going_on(1, times=3)], monkeypatch)
    assert sizes_of_tapes(stage) == {1}
    steps([stage], [joining(opened(1, [5, 6]), opened(2, [7]), token_ids=(4,)), *going_on(3, times=2)], monkeypatch)
    assert sizes_of_tapes(stage) == {3}
    num_bytes = taped(stage)._memory.num_bytes
    steps([stage], [Delta(left=(1,), token_ids=(4, 5)), *going_on(2, times=2)], monkeypatch)
    assert sizes_of_tapes(stage) == {2, 3}
    assert taped(stage)._memory.num_bytes == num_bytes


def test_what_torch_computes_is_noted_without_its_tracer() -> None:
    """Whose import would delay the second token after every start by more than a second."""
    code = (
        "import sys, torch\n"
        "from asyncpipe_workers.tape import OtherCalls\n"
        "with OtherCalls() as others: torch.zeros(3) + 1\n"
        "assert others.found, 'nothing was noted'\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
