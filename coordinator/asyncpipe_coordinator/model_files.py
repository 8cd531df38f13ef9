"""What can be known of a model without torch: where it is, what it is, and whether its files can be right.

Looking here first means that a wrong directory or a broken download is one clear line, before any process is started.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncpipe.errors import Invalid
from asyncpipe.model_place import BUNDLED, BUNDLED_MODEL, download, is_hub_name
from asyncpipe.model_shape import ModelShape, model_fields
from asyncpipe_coordinator.known_models import known_config, known_names
from asyncpipe_coordinator.tensor_files import NUMPY_EMBEDDING, check_tensors
from asyncpipe_coordinator.tensor_shapes import expected_shapes, find_architecture, model_shape

NUMPY_SUFFIX = "-np"  # of a directory of FlexLLMGen's: one file in numpy's format for each tensor
DUMMY_PATH = "_DUMMY_"
GREEDY_DEFAULTS = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
SAMPLING_DEFAULTS = GREEDY_DEFAULTS | {"temperature": 1.0, "top_k": 50}  # transformers' own
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """From config.json and generation_config.json."""

    path: Path
    architecture: str
    shape: ModelShape
    eos_token_ids: frozenset[int]
    dtype: str
    config: dict[str, Any]  # config.json as it is

    @property
    def num_layers(self) -> int:
        return self.shape.num_layers

    @property
    def hidden_size(self) -> int:
        return self.shape.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size

    @property
    def max_context_len(self) -> int:
        return self.shape.max_context_len


def resolve_model(name: str | None, *, dummy: bool = False, weights: str | None = None, with_weights: bool = True) -> Path:
    """A directory for `name`: itself, the bundled model for None, or a hub name's snapshot.

    With `weights`, the directory of FlexLLMGen's in there. With `dummy` a known shape is only a name, and a hub name's weights
    stay where they are, as they do without `with_weights`. Raises Invalid.
    """
    if weights is not None:
        return _numpy_directory(name, weights)
    if name is None:
        return BUNDLED_MODEL
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise Invalid(f"{name} is a file; give the directory that holds config.json")
    if dummy and known_config(name) is not None:
        return Path(name)
    if dummy and "/" not in name:
        raise Invalid(f"there is no directory {name}, and it is no known shape: {', '.join(known_names())}")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise Invalid(f"there is no directory {name} (a hub name looks like facebook/opt-125m)")
    return download(name, with_weights=with_weights and not dummy)


def name_elsewhere(name: str | None) -> str:
    """By which other machines can find the model when they do not have the same directory; empty: none."""
    if name is None:
        return BUNDLED
    return name if is_hub_name(name) else ""


def has_dummy_path(weights: str | None) -> bool:
    """FlexLLMGen's way to ask for weights that need no files."""
    return weights is not None and DUMMY_PATH in weights


def has_tokenizer(path: Path) -> bool:
    return any(all((path / file).is_file() for file in files) for files in TOKENIZERS)


def _numpy_directory(name: str | None, weights: str) -> Path:
    if name is None:
        raise Invalid(f"--path {weights} needs a MODEL, like facebook/opt-1.3b, whose weights are in {weights}/opt-1.3b-np")
    path = Path(weights).expanduser() / f"{Path(name).name.lower()}{NUMPY_SUFFIX}"
    if not path.is_dir():
        raise Invalid(f"--path {weights}: there is no directory {path}; --load-format dummy runs without weights")
    return path.resolve()


def inspect_model(path: Path, *, dummy: bool = False, native: bool = False) -> ModelInfo:
    """Read the configuration and check the weight files against it; `dummy` weights have none. `native`: it must be of a
    family that we have code for.

    Raises Invalid with what is wrong and where.
    """
    config = _find_config(path, dummy=dummy)
    architecture, fields = find_architecture(path, config, native=native), model_fields(config)
    shapes = expected_shapes(path, config)
    if not dummy:
        check_tensors(path, shapes)
    eos = _generation_config(path).get("eos_token_id", config.get("eos_token_id", fields.get("eos_token_id")))
    return ModelInfo(
        path=path,
        architecture=architecture,
        shape=model_shape(path, config),
        eos_token_ids=frozenset(eos if isinstance(eos, list) else () if eos is None else (eos,)),
        dtype=_dtype(fields),
        config=config,
    )


def generation_defaults(path: Path) -> dict[str, float]:
    """temperature, top_k, top_p and repetition_penalty, as generation_config.json has them if it samples; else greedy ones.
    Raises Invalid for a file that cannot be read."""
    config = _generation_config(path)
    if not config.get("do_sample"):
        return GREEDY_DEFAULTS
    own = {name: config.get(name) for name in SAMPLING_DEFAULTS}
    return SAMPLING_DEFAULTS | {name: value for name, value in own.items() if isinstance(value, int | float)}


def _generation_config(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    return _read_json(file) if file.is_file() else {}


def _find_config(path: Path, *, dummy: bool) -> dict[str, Any]:
    """From the file; without one, of a known shape that is only a name, or by whose name FlexLLMGen has put weights there."""
    if (path / "config.json").is_file():
        return _read_json(path / "config.json")
    if (path / NUMPY_EMBEDDING).is_file():
        if known := known_config(path.name.removesuffix(NUMPY_SUFFIX)):
            return known
        raise Invalid(f"{path} has no config.json, and its name is none of a known shape, like opt-1.3b-np; add a config.json")
    if path.is_dir():
        raise Invalid(f"{path} is not a checkpoint: it has no config.json")
    if dummy and (known := known_config(str(path))):
        return known
    raise Invalid(f"there is no directory {path}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Invalid(f"cannot read {path}: {_one_line(error)}") from None
    if not isinstance(value, dict):
        raise Invalid(f"{path} is not a JSON object")
    return value


def _dtype(fields: dict[str, Any]) -> str:
    """Newer configurations say `dtype`, older ones `torch_dtype`."""
    name = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
