"""Converted checkpoints: what is in them, in which order, and how it is checked."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from asyncpipe.errors import Invalid
from asyncpipe.policy import Compression
from asyncpipe_coordinator.model_files import inspect_model
from asyncpipe_workers import convert_files
from asyncpipe_workers.checkpoint import Checkpoint
from asyncpipe_workers.convert import main
from asyncpipe_workers.convert_plan import make_plan
from asyncpipe_workers.memory.quantization import GroupCodec, RowCodec
from tests.checkpoints import SHAPES, distinct_prompts, make_opt
from tests.families import make_family
from tests.stage_chains import Chain, load_chain
from tests.unit.test_checkpoint import all_tensors, save_numpy

LAYER_ORDER = [
    *(f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "out")),
    *(f"self_attn.{name}_proj.bias" for name in ("q", "k", "v", "out")),
    *("self_attn_layer_norm.weight", "self_attn_layer_norm.bias"),
    *("fc1.weight", "fc2.weight", "fc1.bias", "fc2.bias"),
    *("final_layer_norm.weight", "final_layer_norm.bias"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("source"), layers=2)


def converted(source: Path, target: Path, *flags: object) -> Path:
    assert main([*map(str, flags), str(source), str(target)]) == 0
    return target


def refusal(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the module says when it exits with 2."""
    capfd.readouterr()
    assert main(list(map(str, arguments))) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def shards(target: Path) -> list[Path]:
    return sorted(target.glob("*.safetensors"))


def names_in_order(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as file:
        return list(file.offset_keys())


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- what is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_hugging_face_computes_the_same_logits_with_the_converted_checkpoint(shape: str, tmp_path: Path) -> None:
    from transformers import OPTForCausalLM

    source = make_opt(tmp_path / "source", shape=shape, layers=2)
    target = converted(source, tmp_path / "target")
    inspect_model(target)
    logits = []
    for path in (source, target):
        model = OPTForCausalLM.from_pretrained(path).eval()
        with torch.no_grad():
            logits.append(model(torch.tensor([[2, 7, 100, 250]])).logits)
    assert torch.equal(*logits)


def test_a_numpy_directory_becomes_a_checkpoint_that_hugging_face_reads(source: Path, tmp_path: Path) -> None:
    from transformers import OPTForCausalLM

    target = converted(save_numpy(source, tmp_path / "numpy"), tmp_path / "target")
    state = OPTForCausalLM.from_pretrained(target).state_dict()
    for name, tensor in all_tensors(source).items():
        assert torch.equal(state[f"model.{name}"], tensor), name
    assert "lm_head.weight" not in names_in_order(target / "outer.safetensors"), "a tied head is stored once"


@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, {"safe": False}])
def test_sharded_and_bin_checkpoints_become_the_same_files(options: dict[str, Any], source: Path, tmp_path: Path) -> None:
    other = make_opt(tmp_path / "other", layers=2, **options)
    expected, got = converted(source, tmp_path / "a"), converted(other, tmp_path / "b")
    assert [path.read_bytes() for path in shards(got)] == [path.read_bytes() for path in shards(expected)]


def test_a_converted_checkpoint_can_be_converted_again(source: Path, tmp_path: Path) -> None:
    first = converted(source, tmp_path / "first")
    second = converted(first, tmp_path / "second")
    assert [path.read_bytes() for path in shards(second)] == [path.read_bytes() for path in shards(first)]


def test_each_layer_has_a_file_with_its_tensors_in_the_order_of_their_use(source: Path, tmp_path: Path) -> None:
    target = converted(source, tmp_path / "target")
    assert [path.name for path in shards(target)] == [
        "layer-00000.safetensors",
        "layer-00001.safetensors",
        "outer.safetensors",
    ]
    assert names_in_order(target / "layer-00001.safetensors") == [f"model.decoder.layers.1.{name}" for name in LAYER_ORDER]
    weight_map = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == {f"model.{name}" for name in all_tensors(source)}


def test_other_architectures_have_the_attention_first_too(tmp_path: Path) -> None:
    llama = [
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
        *("self_attn.q_proj.bias", "input_layernorm.weight"),
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "post_attention_layernorm.weight",
    ]
    shapes = {name: (2,) if "norm" in name or "bias" in name else (2, 2) for name in llama}
    tensors = {f"model.layers.11.{name}": torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors | {"lm_head.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        plan = make_plan(checkpoint, {"model_type": "llama"}, dtype="auto", compression=None)
    layer, outer = plan.files
    assert (layer.name, outer.name) == ("layer-00011.safetensors", "outer.safetensors")
    assert [tensor.name for tensor in layer.tensors] == [f"model.layers.11.{name}" for name in llama]
    assert [tensor.name for tensor in outer.tensors] == ["lm_head.weight"]


@pytest.mark.parametrize("flags", [[], ["--compress-weight"]])
def test_the_data_of_every_file_begins_at_a_multiple_of_4096(flags: list[str], source: Path, tmp_path: Path) -> None:
    for path in shards(converted(source, tmp_path / "target", *flags)):
        (header_len,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert (8 + header_len) % 4096 == 0
        assert path.stat().st_size > 8 + header_len


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_is_that_of_every_tensor_and_of_the_configuration(dtype: str, source: Path, tmp_path: Path) -> None:
    target = converted(source, tmp_path / "target", "--dtype", dtype)
    assert inspect_model(target).dtype == dtype
    with Checkpoint(target) as checkpoint:
        for name, tensor in all_tensors(source).items():
            read = checkpoint.read(name, tuple(tensor.shape))
            assert torch.equal(read, tensor.to(getattr(torch, dtype)))


def test_dtype_auto_is_the_one_that_is_stored_whatever_the_configuration_says(tmp_path: Path) -> None:
    source = make_opt(tmp_path / "source", dtype="bfloat16", layers=1)
    edit_json(source / "config.json", dtype="float32", torch_dtype="float32")
    config = json.loads((converted(source, tmp_path / "target") / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_numbers_beyond_float16_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = make_opt(tmp_path / "source", layers=1)
    name = "model.decoder.final_layer_norm.weight"
    tensors = {f"model.{each}": tensor for each, tensor in all_tensors(source).items()}
    tensors[name] = tensors[name] * 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    line = refusal(capfd, source, tmp_path / "target", "--dtype", "float16")
    assert "tensor decoder.final_layer_norm.weight cannot be converted" in line
    assert "use --dtype bfloat16 or float32" in line
    assert os.listdir(tmp_path) == ["source"]


def test_tokenizer_and_generation_files_are_copied_and_indices_are_not(tmp_path: Path) -> None:
    source = make_opt(tmp_path / "source", layers=1, max_shard_size="20KB")
    others = {"merges.txt": "a b", "chat_template.jinja": "{{ x }}", "tokenizer.model": "\0\1", "notes.md": "no"}
    for name, text in others.items():
        (source / name).write_text(text)
    target = converted(source, tmp_path / "target")
    copied = {"merges.txt", "chat_template.jinja", "tokenizer.model", "tokenizer.json", "generation_config.json"}
    for name in copied:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    made = {"config.json", "asyncpipe.json", "model.safetensors.index.json", "layer-00000.safetensors", "outer.safetensors"}
    assert set(os.listdir(target)) == copied | made


# --- compressed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [64, 16, 6])
@pytest.mark.parametrize("chunk_bytes", [256, 1 << 20])
def test_compressed_matrices_are_what_the_codec_makes_of_them(
    group_size: int, chunk_bytes: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_files, "CHUNK_BYTES", chunk_bytes)
    target = converted(source, tmp_path / "target", "--compress-weight", "--group-size", group_size, "--dtype", "float16")
    assert inspect_model(target).dtype == "float16"
    codec = GroupCodec(group_size)
    with Checkpoint(target) as checkpoint:
        assert checkpoint.quantization == Compression(num_bits=4, group_size=group_size)
        for name, tensor in all_tensors(source).items():
            if tensor.ndim < 2 or "embed" in name:
                assert torch.equal(checkpoint.read(name, tuple(tensor.shape)), tensor.half())
                continue
            shape = (tensor.shape[0], codec.packed_size(tensor.shape[1]))
            packed = checkpoint.read(f"{name}.q4", shape)
            assert torch.equal(packed, codec.encode(tensor)), name
            where = checkpoint.locate(f"{name}.q4", shape)
            assert where is not None
            assert where.path.read_bytes()[where.offset : where.offset + where.num_bytes] == packed.numpy().tobytes()
            decoded = codec.decode(packed, tensor.shape[1], dtype=torch.float32)
            assert (decoded - tensor).abs().max() < 0.2
            with pytest.raises(Invalid, match=f"tensor {name} is stored compressed, as {name}.q4"):
                checkpoint.read(name, tuple(tensor.shape))


def test_projections_are_compressed_embeddings_are_not_and_the_head_is_both(tmp_path: Path) -> None:
    edit = {"tie_word_embeddings": False}
    source = make_opt(tmp_path / "source", shape="350m", layers=1)
    tensors = {f"model.{name}": tensor for name, tensor in all_tensors(source).items()}
    head = {"lm_head.weight": tensors["model.decoder.embed_tokens.weight"].clone()}
    save_file(tensors | head, source / "model.safetensors", metadata={"format": "pt"})
    edit_json(source / "config.json", **edit)
    target = converted(source, tmp_path / "target", "--compress-weight")
    inspect_model(target)
    with Checkpoint(target) as checkpoint:
        outer = {name for name in checkpoint.names() if ".layers." not in name}
    plain = {"decoder.embed_tokens.weight", "decoder.embed_positions.weight", "lm_head.weight"}
    assert outer == plain | {"lm_head.weight.q4", "decoder.project_in.weight.q4", "decoder.project_out.weight.q4"}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_quantized_start_of_a_converted_checkpoint_quantizes_nothing(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its head is tied or not, and computes what quantizing at the start computes."""
    source = make_family(tmp_path / "source", family)
    target = converted(source, tmp_path / "target", "--compress-weight", "--num-bits", 8)
    prompts = distinct_prompts(3)
    expected = [
        Chain(load_chain(source, split, quantize="int8")).generate(prompts, max_new_tokens=8) for split in ((3,), (1, 2))
    ]
    monkeypatch.setattr(RowCodec, "encode", None)
    found = [Chain(load_chain(target, split, quantize="int8")).generate(prompts, max_new_tokens=8) for split in ((3,), (1, 2))]
    assert found == expected


def test_a_compressed_checkpoint_is_no_source(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = converted(source, tmp_path / "first", "--compress-weight")
    assert "is compressed already" in refusal(capfd, first, tmp_path / "second")
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("group_size", ["0", "3", "5000"])
def test_impossible_groups_are_refused(
    group_size: str, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capfd, source, tmp_path / "target", "--compress-weight", "--group-size", group_size)
    assert f"groups of {group_size}" in line


# --- verify, and the manifest -----------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_bit_and_names_the_file(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = converted(source, tmp_path / "target")
    assert main(["--verify", str(source), str(target)]) == 0
    assert main(["--verify", str(target)]) == 0
    path = target / "layer-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert f"{path} is damaged: its checksum" in refusal(capfd, "--verify", source, target)
    with Checkpoint(target):
        pass  # sizes are right: opening reads no data


def test_verify_needs_a_manifest(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "it has no asyncpipe.json" in refusal(capfd, "--verify", source)


def test_a_converted_directory_that_is_not_whole_is_not_opened(source: Path, tmp_path: Path) -> None:
    target = converted(source, tmp_path / "target")
    path = target / "layer-00001.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    message = "was converted, but file layer-00001.safetensors is missing or cut short; convert again"
    with pytest.raises(Invalid, match=message):
        Checkpoint(target)
    path.unlink()
    with pytest.raises(Invalid, match=message):
        Checkpoint(target)
    (target / "asyncpipe.json").unlink()
    with Checkpoint(target) as checkpoint:  # an ordinary checkpoint: what is there can be read
        assert checkpoint.read("decoder.layers.0.fc1.bias", (64,)).shape == (64,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 2}, "has version 2; this program reads 1"),
        ({"quantization": {"num_bits": 5, "group_size": 64}}, "is damaged"),
        ({"files": [{"name": "../x", "num_bytes": 1, "checksum": ""}]}, "names files of other directories"),
        ({"files": 3}, "is damaged"),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_explained(
    fields: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    target = converted(source, tmp_path / "target")
    edit_json(target / "asyncpipe.json", **fields)
    with pytest.raises(Invalid, match=message):
        Checkpoint(target)
