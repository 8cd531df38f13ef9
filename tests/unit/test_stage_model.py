"""The arithmetic of stages, chained in one process, against Hugging Face."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncpipe.errors import Invalid
from asyncpipe.policy import Policy
from asyncpipe.wire.messages import Chunk, Delta, Opened, Step
from asyncpipe_workers import stage_memory, stage_model
from asyncpipe_workers.memory.kv import ArenaKV
from asyncpipe_workers.models import kernels
from asyncpipe_workers.output import ArrivedStep
from asyncpipe_workers.sampling import Sampled
from tests.checkpoints import SHAPES, distinct_prompts, make_opt, reference_generate
from tests.stage_chains import Chain, joining, load_chain, opened

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITS = [(4,), (2, 2), (1, 3), (2, 1, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_hugging_face_for_every_split(shape: str, tmp_path: Path) -> None:
    path = make_opt(tmp_path, shape=shape)
    prompts = distinct_prompts(6)
    expected = reference_generate(path, prompts, max_new_tokens=10)
    assert len({tuple(tokens) for tokens in expected}) >= len(prompts) - 1, "the outputs must tell prompts apart"
    for split in SPLITS:
        chain = Chain(load_chain(path, split))
        tokens = chain(joining(*(opened(n, prompt) for n, prompt in enumerate(prompts))))
        generated = [[token] for token in tokens]
        for _ in range(9):
            tokens = chain(Delta(token_ids=tokens))
            for sequence, token in zip(generated, tokens, strict=True):
                sequence.append(token)
        assert generated == expected, f"split {split}"


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_within_1e_4_of_hugging_face_for_every_split(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import OPTForCausalLM

    path = make_opt(tmp_path, shape=shape)
    model = OPTForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = distinct_prompts(3)[2]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    for split in SPLITS:
        stages = load_chain(path, split)
        seen: list[torch.Tensor] = []
        monkeypatch.setattr(stage_model, "sample", lambda logits, samplers, seen=seen: seen.append(logits) or Sampled((5,)))
        Chain(stages)(joining(opened(0, prompt)))
        assert seen[0].shape == (1, expected.shape[0]), "only the last position's logits are computed"
        assert (seen[0][0] - expected).abs().max() < 1e-4


def test_sequences_that_join_and_leave_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = make_opt(tmp_path)
    prompts = distinct_prompts(5, seed=3)
    expected = reference_generate(path, prompts, max_new_tokens=12)
    chain = Chain(load_chain(path, (3, 1)))
    running: list[int] = []
    got: dict[int, list[int]] = {n: [] for n in range(5)}

    def step(left: tuple[int, ...] = (), joins: tuple[int, ...] = ()) -> None:
        staying = [n for n in running if n not in left]
        delta = joining(
            *(opened(n, prompts[n]) for n in joins),
            left=left,
            token_ids=tuple(got[n][-1] for n in staying),
        )
        running[:] = [*staying, *joins]
        for n, token in zip(running, chain(delta), strict=True):
            got[n].append(token)

    step(joins=(0, 1, 2))
    step()
    step(left=(0,), joins=(3,))
    step()
    step(left=(2,), joins=(4,))
    step(left=(1,))
    step()
    step(left=(3, 4))
    assert {n: len(tokens) for n, tokens in got.items()} == {0: 2, 1: 5, 2: 4, 3: 5, 4: 3}
    assert all(expected[n][: len(tokens)] == tokens for n, tokens in got.items())


def test_each_stage_holds_only_its_own_parameters(tmp_path: Path) -> None:
    path = make_opt(tmp_path)
    (whole,) = load_chain(path, (4,))
    first, middle, last = load_chain(path, (1, 2, 1))
    layer = middle.num_params // 2
    embeddings = 320 * 32 + 162 * 32
    assert first.num_params == layer + embeddings
    assert last.num_params == layer + 320 * 32 + 2 * 32  # the tied head's copy, and the final norm
    assert whole.num_params == 4 * layer + embeddings + 2 * 32
    assert whole.param_bytes - 4 * whole.num_params in (0, 320 * 32 * 4)  # the head may be there once more, packed


def test_weights_in_16_bits_stay_so_where_kernels_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "quickest_form", lambda what, makers, *_: next(iter(makers)))
    stages = {
        dtype: load_chain(make_opt(tmp_path / dtype, dtype=dtype), (4,), "float32")[0] for dtype in ("float32", "bfloat16")
    }
    if "compiled" not in kernels.FloatLinears(torch.float32).forms(torch.bfloat16):
        pytest.skip("no kernels are compiled here")
    float32, bfloat16 = (stages[dtype].param_bytes for dtype in ("float32", "bfloat16"))
    assert bfloat16 < 0.65 * float32  # the head is there twice, laid out for its kernel, and vectors are converted


@pytest.mark.parametrize(
    ("quantize", "kv_dtype", "expected"),
    [
        ("int8", "auto", torch.float16),
        ("int8", "float32", torch.float32),
        ("", "auto", torch.float32),
        ("", "float16", torch.float16),
    ],
)
def test_keys_and_values_are_in_half_precision_where_that_costs_little(
    quantize: str, kv_dtype: str, expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_memory, "newest_attention", lambda **_: "a kernel")
    stages = load_chain(make_opt(tmp_path), (2, 2), quantize=quantize, kv_dtype=kv_dtype)
    (whole,) = load_chain(tmp_path, (4,), quantize=quantize, kv_dtype="float32")
    for stage in stages:
        assert isinstance(stage._memory.cache, ArenaKV)
        assert stage._memory.cache._keys[0].dtype == expected
    prompts = distinct_prompts(3)
    found, exact = (Chain(each).generate(prompts, max_new_tokens=8, chunk=40) for each in (stages, [whole]))
    assert found == exact or quantize, "only codes of weights bring tokens so close that it would matter"


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"kv_dtype": "float8"}, "use one of"),
        ({"kv_dtype": "bfloat16"}, "are in float32, as --dtype says, or in float16 on a CPU"),
        ({"kv_dtype": "float16", "policy": Policy(cache_gpu_percent=50.0, cache_cpu_percent=50.0)}, "and has all of them"),
    ],
)
def test_keys_and_values_in_what_nobody_computes_with_are_refused(plan: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=words):
        load_chain(make_opt(tmp_path), (4,), **plan)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_through_two_stages(dtype: str, tmp_path: Path) -> None:
    path = make_opt(tmp_path, dtype=dtype)
    tokens = Chain(load_chain(path, (2, 2), dtype))(joining(opened(0, [5, 6, 7]), opened(1, [8])))
    assert len(tokens) == 2


@pytest.mark.parametrize("options", [{"max_shard_size": "40KB"}, {"safe": False}])
def test_sharded_and_bin_checkpoints_give_the_same_tokens(options: dict[str, object], tmp_path: Path) -> None:
    prompts = distinct_prompts(3)
    results = []
    for name, extra in (("plain", {}), ("other", options)):
        path = make_opt(tmp_path / name, **extra)  # type: ignore[arg-type]
        delta = joining(*(opened(n, prompt) for n, prompt in enumerate(prompts)))
        results.append(Chain(load_chain(path, (2, 2)))(delta))
    assert results[0] == results[1]


def test_seeded_sampling_does_not_depend_on_neighbours(tmp_path: Path) -> None:
    path = make_opt(tmp_path)
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 11}

    def run(neighbours: int) -> list[int]:
        chain = Chain(load_chain(path, (4,)))
        others = tuple(opened(n, [n + 5, 6], temperature=1.0, seed=n) for n in range(1, neighbours + 1))
        tokens = chain(joining(*others, opened(0, [9, 8, 7], **options)))
        got = [tokens[-1]]
        for _ in range(8):
            tokens = chain(Delta(token_ids=tokens))
            got.append(tokens[-1])
        return got

    alone = run(0)
    assert alone == run(3)
    assert len(set(alone)) > 2


def test_a_stage_that_is_the_whole_pipeline_takes_several_steps_at_once(tmp_path: Path) -> None:
    """Greedy and drawn: as one by one."""
    path = make_opt(tmp_path)
    both = opened(0, [5, 6]), opened(1, [7, 8, 9], temperature=1.0, seed=3)
    chain = Chain(load_chain(path, (4,)))
    tokens = [chain(joining(*both))]
    for _ in range(7):
        tokens.append(chain(Delta(token_ids=tokens[-1])))
    chain = Chain(load_chain(path, (4,)))
    begun = chain(joining(*both, num_steps=3))
    going_on = chain(Delta(token_ids=begun[-2:], num_steps=4))
    alone = chain(Delta(token_ids=going_on[-1:], left=(0,)))
    assert begun + going_on + alone == tuple(itertools.chain(*tokens))[:14] + tokens[7][1:]


def test_scores_of_several_steps_at_once_are_in_their_order(tmp_path: Path) -> None:
    (stage,) = load_chain(make_opt(tmp_path), (4,))
    delta = joining(opened(0, [5, 6, 7], logprobs=1, prompt_logprobs=0), opened(1, [8]), num_steps=3)
    (output,) = stage.compute([ArrivedStep(Step(epoch=1, micro_batch=0, step=0, delta=delta), 0)])
    scored = [scores and scores.token_id for scores in output.logprobs]
    assert scored == [token_id if place % 2 == 0 else None for place, token_id in enumerate(output.token_ids)]
    assert len(output.token_ids) == 6
    assert [len(prompt.logprobs) for prompt in output.prompt_logprobs] == [2]


def test_a_part_of_a_pipeline_computes_one_of_several_steps_at_once(tmp_path: Path) -> None:
    chains = [Chain(load_chain(make_opt(tmp_path / str(count)), (2, 2))) for count in (1, 5)]
    first, same = (chain(joining(opened(0, [5, 6]), num_steps=count)) for chain, count in zip(chains, (1, 5), strict=True))
    assert len(first) == 1
    assert first == same


def test_a_delta_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    chain = Chain(load_chain(make_opt(tmp_path), (4,)))
    chain(joining(opened(0, [5, 6])))
    with pytest.raises(Invalid, match="2 tokens for the 1 sequences"):
        chain(Delta(token_ids=(1, 2)))
    with pytest.raises(Invalid, match="sequence 7 leaves"):
        chain(Delta(left=(7,), token_ids=(1,)))


def test_chunks_moves_and_second_beginnings_change_no_token(tmp_path: Path) -> None:
    """A prompt in pieces through several micro-batches; a sequence that moves; one that loses its cache and begins again."""
    path = make_opt(tmp_path)
    first, second = distinct_prompts(8, seed=5)[6:8]
    expected = reference_generate(path, [first, second], max_new_tokens=6)
    chain = Chain(load_chain(path, (1, 3)))
    middle = len(first) // 2
    assert chain(Delta(opened=(opened(0, first),), chunks=(Chunk(0, 1),)), micro_batch=0) == ()
    assert chain(Delta(chunks=(Chunk(0, middle),)), micro_batch=1) == ()
    got = [list(chain(Delta(chunks=(Chunk(0, len(first) - middle - 1),)), micro_batch=2)), []]
    got[1] += chain(joining(opened(1, second)), micro_batch=0)
    chain(Delta(parted=(0,)), micro_batch=2)
    for _ in range(3):
        tokens = chain(Delta(adopted=() if len(got[0]) > 1 else (0,), token_ids=(got[1][-1], got[0][-1])), micro_batch=0)
        for sequence, token in zip((got[1], got[0]), tokens, strict=True):
            sequence.append(token)
    again = Opened(7, (*first, *got[0]), len(first))
    got[0] += chain(Delta(left=(0, 1), opened=(again,), chunks=(Chunk(7, len(again.token_ids)),)), micro_batch=1)
    got[0] += chain(Delta(token_ids=(got[0][-1],)), micro_batch=1)
    assert got[0] == expected[0]
    assert got[1] == expected[1][:4]


def test_rows_of_padding_change_no_token(tmp_path: Path) -> None:
    path = make_opt(tmp_path)
    prompts = distinct_prompts(3)
    results = []
    for padding in (0, 5):
        chain = Chain(load_chain(path, (2, 2)))
        tokens = chain(joining(*(opened(n, prompt) for n, prompt in enumerate(prompts)), padding=padding))
        results.append((tokens, chain(Delta(token_ids=tokens, padding=padding))))
    assert results[0] == results[1]
