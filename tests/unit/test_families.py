"""Every family against Hugging Face: logits and tokens, over stages, chunks and tiers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asyncpipe.errors import Invalid
from asyncpipe.policy import Placement, Policy
from asyncpipe.tensor_names import plain_name
from asyncpipe.wire.messages import Opened
from asyncpipe_coordinator.core.partition import LayerRange
from asyncpipe_coordinator.model_files import inspect_model
from asyncpipe_coordinator.planner.demand import kv_token_bytes, stage_demand
from asyncpipe_coordinator.tensor_files import read_header
from asyncpipe_coordinator.tensor_shapes import SUPPORTED, expected_shapes, model_shape
from asyncpipe_workers import stage_model
from asyncpipe_workers.convert import main as convert
from asyncpipe_workers.models import kernels
from asyncpipe_workers.models.registry import FAMILIES, find_model
from asyncpipe_workers.sampling import Sampled
from tests.checkpoints import distinct_prompts
from tests.families import CONTEXT, LLAMA3, LONG, VARIANTS, make_family, make_multimodal, reference_logits, reference_tokens
from tests.stage_chains import Chain, joining, load_chain, opened

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITS = [(3,), (1, 2), (1, 1, 1)]
NUM_TOKENS = 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=VARIANTS)
def path(request: pytest.FixtureRequest, directory: Path) -> Path:
    return made(directory, request.param)


def made(directory: Path, name: str) -> Path:
    """Once for all tests."""
    path = directory / name
    return path if path.is_dir() else make_family(path, name)


def differences(path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Between our logits, computed in `dtype`, and Hugging Face's in float32."""
    prompts = distinct_prompts(4, longest=90)
    expected = torch.stack([logits[-1] for logits in reference_logits(path, prompts)])
    assert expected.std() > 1
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(stage_model, "sample", lambda logits, samplers: seen.append(logits) or Sampled((5,) * len(samplers)))
    Chain(load_chain(path, (1, 2), dtype))(joining(*(opened(n, prompt) for n, prompt in enumerate(prompts))))
    return (seen[0].float() - expected).abs()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_hugging_face(dtype: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = differences(path, dtype, monkeypatch)
    assert found.max() < 1e-4 if dtype == "float32" else found.mean() < 0.1


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_stored_in_16_bits_are_the_same_in_float32(
    stored: torch.dtype, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the form that keeps them as they are, where there is one."""
    monkeypatch.setattr(kernels, "quickest_form", lambda what, makers, *_: next(iter(makers)))
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    for file in copy.glob("*.safetensors"):
        save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert differences(copy, "float32", monkeypatch).max() < 1e-4


def test_greedy_tokens_equal_hugging_face_for_every_split_and_in_chunks(path: Path) -> None:
    prompts = distinct_prompts(5, longest=90)
    expected = reference_tokens(path, prompts, max_new_tokens=NUM_TOKENS)
    assert len({tuple(tokens) for tokens in expected}) >= len(prompts) - 1, "the outputs must tell prompts apart"
    for split in SPLITS:
        assert Chain(load_chain(path, split)).generate(prompts, max_new_tokens=NUM_TOKENS) == expected, f"split {split}"
    assert Chain(load_chain(path, (2, 1))).generate(prompts, max_new_tokens=NUM_TOKENS, chunk=7) == expected


# --- weights, keys and values elsewhere -------------------------------------------------------------------------------


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3", "phi3-long"])
def test_streamed_weights_give_the_same_tokens(name: str, separate: bool, directory: Path, tmp_path: Path) -> None:
    path = made(directory, name)
    prompts = distinct_prompts(4, longest=60)
    expected = reference_tokens(path, prompts, max_new_tokens=NUM_TOKENS)
    policy = Policy(w_gpu_percent=0, w_cpu_percent=40, sep_layer=separate, gpu_batch_size=2, placement=Placement.EXACT)
    stages = load_chain(path, (2, 1), policy=policy, offload_dir=str(tmp_path))
    assert all(stage.tiers.weights.disk for stage in stages)
    assert Chain(stages).generate(prompts, max_new_tokens=NUM_TOKENS) == expected
    for stage in stages:
        stage.close()


def test_grouped_keys_and_values_on_tiers_give_the_same_tokens(directory: Path, tmp_path: Path) -> None:
    path = made(directory, "llama")
    prompts = distinct_prompts(4, longest=60)
    expected = reference_tokens(path, prompts, max_new_tokens=NUM_TOKENS)
    policy = Policy(cache_gpu_percent=30, cache_cpu_percent=40, gpu_batch_size=2)
    stages = load_chain(path, (2, 1), policy=policy, offload_dir=str(tmp_path))
    assert Chain(stages).generate(prompts, max_new_tokens=NUM_TOKENS, chunk=9) == expected
    for stage in stages:
        stage.close()


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_windows_and_caps_keep_keys_and_values_on_the_device(name: str, directory: Path) -> None:
    with pytest.raises(Invalid, match="its attention has a window, or caps its scores"):
        load_chain(made(directory, name), (3,), policy=Policy(cache_gpu_percent=0, cache_cpu_percent=100))


# --- converted checkpoints, and what the coordinator knows of them ----------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe"])
def test_a_converted_checkpoint_gives_the_same_tokens(name: str, directory: Path, tmp_path: Path) -> None:
    path, target = made(directory, name), tmp_path / "target"
    assert convert([str(path), str(target)]) == 0
    inspect_model(target)
    assert {file.name for file in target.glob("layer-*")} == {f"layer-{n:05}.safetensors" for n in range(3)}
    prompts = distinct_prompts(3, longest=40)
    expected = Chain(load_chain(path, (3,))).generate(prompts, max_new_tokens=NUM_TOKENS)
    assert Chain(load_chain(target, (1, 2))).generate(prompts, max_new_tokens=NUM_TOKENS) == expected


def test_a_layers_tensors_lie_in_the_order_of_their_use(directory: Path, tmp_path: Path) -> None:
    names = {}
    for name in ("gpt2", "qwen3-moe"):
        assert convert([str(made(directory, name)), str(tmp_path / name)]) == 0
        with safe_open(tmp_path / name / "layer-00000.safetensors", "pt") as file:
            found = file.offset_keys()
        names[name] = [key.split(".0.", 1)[1].removesuffix(".weight") for key in found if key.endswith("weight")]
    assert names["gpt2"] == ["attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2"]
    first = [f"mlp.experts.0.{part}_proj" for part in ("gate", "up", "down")]
    assert names["qwen3-moe"][-16:-12] == ["post_attention_layernorm", *first]


def test_the_coordinator_expects_the_tensors_that_transformers_writes(path: Path) -> None:
    info = inspect_model(path)
    expected = expected_shapes(path, info.config)
    found = {plain_name(name): shape for name, shape in read_header(path / "model.safetensors").items()}
    assert expected == found
    assert (info.num_layers, info.hidden_size, info.vocab_size, info.max_context_len) == (3, 32, 320, CONTEXT)


def test_the_coordinator_and_workers_know_the_same_families() -> None:
    assert tuple(FAMILIES) == SUPPORTED


@pytest.mark.parametrize("policy", [Policy(), Policy(compress_weight=True)])
def test_the_planner_counts_what_stages_hold(path: Path, policy: Policy, tmp_path: Path) -> None:
    info = inspect_model(path)
    stages = load_chain(path, (1, 2), policy=policy, offload_dir=str(tmp_path))
    for stage, layers in zip(stages, (LayerRange(0, 1), LayerRange(1, 3)), strict=True):
        demand = stage_demand(
            shapes=expected_shapes(path, info.config),
            model=info.shape,
            layers=layers,
            dtype_bytes=4,
            stored_dtype_bytes=4,
            policy=policy,
            num_micro_batches=1,
            step_tokens=64,
            kv_block_tokens=16,
        )
        stored_twice = 320 * 32 * 4 if info.shape.has_tied_head else 0  # a head that is packed, beside the table
        assert stage.param_bytes - demand.weights in (0, stored_twice)
        stage.close()
    assert kv_token_bytes(info.shape, 4, Policy()) == 2 * 4 * info.shape.num_kv_heads * info.shape.head_size


# --- configurations as they are published -----------------------------------------------------------------------------

OLDER = {
    "llama3": {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": {**LLAMA3, "type": "llama3"}, "head_dim": None},
    "phi3-long": {
        "rope_parameters": None,
        "rope_theta": 1000.0,
        "rope_scaling": {"type": "su"} | {key: LONG[key] for key in ("short_factor", "long_factor")},
        "partial_rotary_factor": 0.75,
    },
    "gemma3": {
        "rope_parameters": None,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "layer_types": None,
        "sliding_window_pattern": 2,
    },
    "mixtral": {"rope_parameters": None, "rope_theta": 1e6},
}


@pytest.mark.parametrize("name", OLDER)
def test_older_configurations_mean_the_same(name: str, directory: Path) -> None:
    newer = json.loads((made(directory, name) / "config.json").read_text())
    configs: list[Any] = [find_model(json.dumps(fields)).config for fields in (newer, newer | OLDER[name])]
    for new, old in zip(configs[0].ropes, configs[1].ropes, strict=True):
        assert torch.equal(new.inverse_F, old.inverse_F)
        assert (new.long_F is None) == (old.long_F is None) and new.scale == old.scale
    assert configs[0].windows == configs[1].windows


def test_the_text_part_of_gemma_3_runs_without_its_eyes(tmp_path: Path) -> None:
    path = make_multimodal(tmp_path)
    prompts = distinct_prompts(3, longest=40)
    expected = reference_tokens(path, prompts, max_new_tokens=NUM_TOKENS)
    assert inspect_model(path).num_layers == 3
    assert Chain(load_chain(path, (1, 2))).generate(prompts, max_new_tokens=NUM_TOKENS) == expected


def test_published_gemma_3_configurations_leave_most_fields_out() -> None:
    text = {"model_type": "gemma3_text", "num_hidden_layers": 34, "hidden_size": 2560, "intermediate_size": 10240}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    fields = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    shape = model_shape(Path(), fields)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_size, shape.vocab_size) == (8, 4, 256, 262_208)
    assert shape.has_tied_head
    config: Any = find_model(json.dumps(fields)).config
    assert [window is None for window in config.windows[:7]] == [False] * 5 + [True, False]
    assert config.ropes[5].inverse_F[0] == 0.125 and config.ropes[0].inverse_F[0] == 1.0


def test_gpt2_is_read_with_and_without_a_prefix(directory: Path, tmp_path: Path) -> None:
    path, prompts = made(directory, "gpt2"), distinct_prompts(3, longest=40)
    tensors = {plain_name(name): tensor for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    fields = json.loads((path / "config.json").read_text())
    fields.pop("tie_word_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    inspect_model(tmp_path)
    results = [Chain(load_chain(each, (3,))).generate(prompts, max_new_tokens=NUM_TOKENS) for each in (path, tmp_path)]
    assert results[0] == results[1]


def test_a_sequence_keeps_its_rotary_frequencies_when_it_grows(directory: Path) -> None:
    """As transformers, which computes a prompt of no more than 48 tokens with the short ones, does until it begins anew."""
    path = made(directory, "phi3-long")
    prompt = distinct_prompts(2, longest=46)[1]
    grown = Chain(load_chain(path, (1, 2))).generate([prompt], max_new_tokens=8)[0]
    chain = Chain(load_chain(path, (1, 2)))
    again = Opened(0, (*prompt, *grown[:5]), len(prompt))  # begun again, as after a loss of its cache
    assert chain(joining(again)) == (grown[5],)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": []}, "model_type 'llama' is not supported; supported: OPTForCausalLM, GPT2LMHeadModel"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized with gptq, which is not supported yet"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 key-value heads evenly"),
        ({"intermediate_size": None}, "intermediate_size is None; it must be a positive number"),
        ({"intermediate_size": 40}, r"layers.0.mlp.gate_proj.weight has shape 48x32; config.json says 40x32"),
        ({"head_dim": 16}, r"layers.0.self_attn.q_proj.weight has shape 32x32; config.json says 64x32"),
    ],
)
def test_what_cannot_be_is_one_clear_line(changes: dict[str, Any], message: str, directory: Path, tmp_path: Path) -> None:
    path = made(directory, "llama")
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | changes))
    with pytest.raises(Invalid, match=message) as found:
        inspect_model(tmp_path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not known; known: default"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_type 'llama3' needs 'low_freq_factor'"),
        ({"hidden_act": "swish2"}, "activation 'swish2' is not known; known: relu"),
    ],
)
def test_workers_refuse_what_they_cannot_compute(changes: dict[str, Any], message: str, directory: Path) -> None:
    fields = json.loads((made(directory, "llama") / "config.json").read_text())
    with pytest.raises(Invalid, match=message):
        find_model(json.dumps(fields | changes))
