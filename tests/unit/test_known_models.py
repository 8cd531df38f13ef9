"""Shapes that need no files, random weights, and FlexLLMGen's directories."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from asyncpipe.errors import Invalid
from asyncpipe.model_place import BUNDLED_MODEL
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.known_models import known_config, known_names
from asyncpipe_coordinator.model_files import inspect_model, resolve_model
from asyncpipe_coordinator.service import tokenizer_path
from asyncpipe_coordinator.tensor_shapes import expected_shapes

GIB = 2**30
FLEXLLMGEN_GIB = {"1.3b": 2.443, "6.7b": 12.386, "13b": 23.921, "30b": 55.803, "66b": 122.375, "175b": 325.175}


def num_params(name: str) -> int:
    config = known_config(name)
    assert config is not None
    return sum(math.prod(shape) for shape in expected_shapes(Path(name), config).values())


@pytest.mark.parametrize("size", FLEXLLMGEN_GIB)
def test_sizes_are_those_of_flexllmgens_formula(size: str) -> None:
    config = known_config(f"facebook/opt-{size}")
    assert config is not None
    layers, h, vocab = config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
    formula = layers * (h * (3 * h + 1) + h * (h + 1) + h * (4 * h + 1) + 4 * h * (h + 1) + 4 * h) + vocab * (h + 1)
    assert 2 * formula / GIB == pytest.approx(FLEXLLMGEN_GIB[size], abs=0.001)
    # It counts one bias for queries, keys and values, and one for the head; not the positions and the last norm.
    assert num_params(f"opt-{size}") == formula + layers * 2 * h - vocab + (2048 + 2) * h + 2 * h


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("opt-125m", 125),
        ("opt-350m", 331),
        ("opt-2.7b", 2652),
        ("opt-175b-stage", 44_142),
        ("opt-iml-30b", 29_975),
        ("galactica-125m", 125),
        ("galactica-6.7b", 6656),
        ("galactica-120b", 121_329),
    ],
)
def test_sizes_are_those_that_are_published(name: str, millions: int) -> None:
    assert num_params(name) / 1e6 == pytest.approx(millions, rel=0.01)


def test_names_are_found_with_and_without_an_owner_in_any_case() -> None:
    assert known_config("facebook/opt-1.3b") == known_config("OPT-1.3B") == known_config("Facebook/OPT-1.3b")
    assert known_config("opt-iml-max-1.3b") == known_config("opt-1.3b")
    assert known_config("opt-9b") is None


def test_a_caller_may_change_what_it_gets() -> None:
    config = known_config("opt-125m")
    assert config is not None
    config["vocab_size"] = 1
    assert known_config("opt-125m") != config


@pytest.mark.parametrize("name", known_names())
def test_every_known_name_is_a_model_without_files(name: str) -> None:
    info = inspect_model(resolve_model(f"facebook/{name}", dummy=True), dummy=True)
    assert (info.architecture, info.dtype, info.max_context_len) == ("OPTForCausalLM", "float16", 2048)
    assert info.path.name == name
    assert info.eos_token_ids == {2}
    assert info.hidden_size % info.config["num_attention_heads"] == 0


def test_without_dummy_weights_a_known_name_is_a_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []
    monkeypatch.setattr(
        "asyncpipe_coordinator.model_files.download", lambda name, *, with_weights: looked_up.append(name) or Path("x")
    )
    resolve_model("facebook/opt-125m")
    assert looked_up == ["facebook/opt-125m"]
    resolve_model("facebook/opt-125m", dummy=True)
    assert looked_up == ["facebook/opt-125m"]


def test_dummy_weights_need_a_known_name_or_a_directory() -> None:
    with pytest.raises(Invalid, match="no known shape: opt-125m, opt-350m"):
        resolve_model("opt-9b", dummy=True)
    with pytest.raises(Invalid, match="no directory"):
        inspect_model(Path("facebook/opt-125m"))


def test_dummy_weights_need_only_a_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(known_config("opt-125m")))
    assert inspect_model(resolve_model(str(tmp_path), dummy=True), dummy=True).num_layers == 12
    with pytest.raises(Invalid, match="no weights"):
        inspect_model(tmp_path)


def test_dummy_weights_without_a_tokenizer_have_the_bundled_one(tmp_path: Path) -> None:
    def found(**fields: int) -> Path:
        (tmp_path / "config.json").write_text(json.dumps((known_config("galactica-125m") or {}) | fields))
        config = ServiceConfig(checkpoint=tmp_path, dummy_weights=True)
        return tokenizer_path(config, inspect_model(tmp_path, dummy=True))

    assert found() == BUNDLED_MODEL
    with pytest.raises(Invalid, match="vocabulary of 100 is too small"):
        found(vocab_size=100)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert found(vocab_size=100) == tmp_path


# --- FlexLLMGen's directories -----------------------------------------------------------------------------------------


def save_arrays(directory: Path, name: str) -> Path:
    """Files of the right shapes, one for each tensor, without an extension; they hold nothing but holes."""
    config = known_config(name)
    assert config is not None
    directory.mkdir(parents=True)
    for tensor, shape in expected_shapes(directory, config).items():
        file = directory / tensor.replace("decoder.final_layer_norm", "decoder.layer_norm")
        array = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
        del array
    return directory


def test_a_directory_of_arrays_is_known_by_its_name(tmp_path: Path) -> None:
    path = save_arrays(tmp_path / "opt-125m-np", "opt-125m")
    assert resolve_model(str(path)) == resolve_model("facebook/OPT-125m", weights=str(tmp_path)) == path
    info = inspect_model(path)
    assert (info.num_layers, info.dtype) == (12, "float16")


def test_a_directory_of_arrays_of_another_name_needs_a_config_json(tmp_path: Path) -> None:
    path = save_arrays(tmp_path / "mine", "opt-125m")
    with pytest.raises(Invalid, match=r"add a config\.json"):
        inspect_model(path)
    (path / "config.json").write_text(json.dumps(known_config("opt-125m")))
    assert inspect_model(path).num_layers == 12


def test_a_path_without_the_models_arrays_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"opt-1\.3b-np; --load-format dummy"):
        resolve_model("facebook/opt-1.3b", weights=str(tmp_path))
    with pytest.raises(Invalid, match="needs a MODEL"):
        resolve_model(None, weights=str(tmp_path))
