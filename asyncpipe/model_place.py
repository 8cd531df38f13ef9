"""Where a model's files are: a directory, the bundled model, or a snapshot from the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from asyncpipe.errors import Invalid

BUNDLED_MODEL = Path(__file__).parent / "bundled_model"
BUNDLED = "bundled"  # its name, where models have names: a hub name has a slash
HUB_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def is_hub_name(name: str) -> bool:
    """Whether it looks like one: facebook/opt-125m."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def download(name: str, *, with_weights: bool) -> Path:
    """The hub's snapshot of `name`, from its cache or over the network. HF_HOME, HF_HUB_OFFLINE and HF_TOKEN are respected.

    Raises Invalid.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if not with_weights:
            return Path(snapshot_download(name, allow_patterns=HUB_SMALL_FILES))
        path = Path(snapshot_download(name, allow_patterns=[*HUB_SMALL_FILES, "*.safetensors"]))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(name, allow_patterns=[*HUB_SMALL_FILES, "*.bin"]))
        return path
    except HFValidationError as error:
        raise Invalid(f"{name} is neither a directory nor a hub name: {_one_line(error)}") from None
    except LocalEntryNotFoundError:
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise Invalid(f"{name} is not a directory, it is not in the hub's local cache, and {why}") from None
    except (HfHubHTTPError, OSError) as error:
        raise Invalid(f"cannot get {name} from the hub: {_one_line(error)}") from None


def find_checkpoint(directory: str, name: str) -> Path:
    """On this machine, what is `directory` on another one: the same path, or else what `name`, a hub name or `BUNDLED`, is
    here.

    Raises Invalid.
    """
    if Path(directory).is_dir():
        return Path(directory)
    if name == BUNDLED:
        return BUNDLED_MODEL
    if name:
        return download(name, with_weights=True)
    raise Invalid(f"there is no directory {directory} on this machine; say with --model where the model is")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
