"""Where models come from: directories, and hub names through a local cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from asyncpipe.errors import Invalid
from asyncpipe.model_place import BUNDLED_MODEL
from asyncpipe_coordinator.cli import build_parser
from asyncpipe_coordinator.model_files import inspect_model, resolve_model
from asyncpipe_coordinator.options import sampling_options
from tests.checkpoints import SHAPES, make_opt

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub lays it out, with one model, org/tiny, and no way to the network."""
    import huggingface_hub.constants as constants

    model = tmp_path / "models--org--tiny"
    make_opt(model / "snapshots" / REVISION)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_without_a_name_the_bundled_model_is_used() -> None:
    info = inspect_model(resolve_model(None))
    assert info.path == BUNDLED_MODEL
    assert (info.architecture, info.num_layers, info.eos_token_ids) == ("OPTForCausalLM", 4, {2})
    assert (BUNDLED_MODEL / "model.safetensors").stat().st_size <= 4_000_000


def test_a_hub_name_is_found_in_the_local_cache(hub_cache: Path) -> None:
    path = resolve_model("org/tiny")
    assert path.name == REVISION
    assert inspect_model(path).num_layers == 4


def test_a_hub_name_that_is_not_cached_is_refused_offline(hub_cache: Path) -> None:
    with pytest.raises(Invalid, match="org/other is not a directory, it is not in the hub's local cache, and HF_HUB_OFFLINE"):
        resolve_model("org/other")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "nowhere"])
def test_what_looks_like_a_path_is_not_looked_up_in_the_hub(name: str) -> None:
    with pytest.raises(Invalid, match="there is no directory"):
        resolve_model(name)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_opt_passes_inspection(shape: str, tmp_path: Path) -> None:
    assert inspect_model(make_opt(tmp_path, shape=shape)).max_context_len == 160


def test_sharded_checkpoints_are_checked_shard_by_shard(tmp_path: Path) -> None:
    path = make_opt(tmp_path, max_shard_size="40KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 1
    inspect_model(path)
    kept = shards[1].read_bytes()
    shards[1].write_bytes(kept[:-1])
    with pytest.raises(Invalid, match=f"{shards[1].name} is cut short"):
        inspect_model(path)
    shards[1].unlink()
    with pytest.raises(Invalid, match=f"names {shards[1].name}, which is not there"):
        inspect_model(path)


def test_a_file_in_place_of_a_directory_is_explained(tmp_path: Path) -> None:
    path = make_opt(tmp_path)
    with pytest.raises(Invalid, match="give the directory"):
        resolve_model(str(path / "config.json"))
    shutil.rmtree(path)
    with pytest.raises(Invalid, match="no directory"):
        inspect_model(path)


def options(path: Path, *flags: str) -> dict[str, object]:
    arguments = build_parser().parse_args(["generate", str(path), *flags])
    found = sampling_options(arguments, path)
    return {name: found.get(name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        (None, [], (0.0, 0, 1.0, 1.0)),
        ({"temperature": 0.6, "top_p": 0.9}, [], (0.0, 0, 1.0, 1.0)),
        ({"do_sample": True}, [], (1.0, 50, 1.0, 1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}, [], (0.6, 20, 0.9, 1.0)),
        ({"do_sample": True, "repetition_penalty": 1.05, "top_k": None}, ["--top-k", "7"], (1.0, 7, 1.0, 1.05)),
        ({"do_sample": True, "temperature": 0.6}, ["--temperature", "0"], (0.0, 50, 1.0, 1.0)),
    ],
)
def test_sampling_is_as_the_checkpoint_says_unless_a_flag_says_otherwise(
    config: dict[str, object] | None, flags: list[str], expected: tuple[float, ...], tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert tuple(options(tmp_path, *flags).values()) == expected
