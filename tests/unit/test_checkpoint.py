"""Checkpoints in every form that they come in: what is read, where it lies, and what is said of broken ones."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from asyncpipe.errors import Invalid
from asyncpipe_coordinator.model_files import inspect_model
from asyncpipe_workers.checkpoint import Checkpoint
from asyncpipe_workers.checkpoint_files import DTYPES
from tests.checkpoints import make_opt

EMBEDDING = "decoder.embed_tokens.weight"
NORM = "decoder.final_layer_norm.weight"
SOURCES = ("single", "sharded", "bin", "numpy", "bare")


def save_numpy(source: Path, directory: Path) -> Path:
    """FlexLLMGen's form of a checkpoint, with the configuration beside it."""
    directory.mkdir()
    shutil.copy(source / "config.json", directory)
    tensors = all_tensors(source)
    for name, tensor in (tensors | {"lm_head.weight": tensors[EMBEDDING]}).items():
        file = name.replace("decoder.final_layer_norm", "decoder.layer_norm")
        with (directory / file).open("wb") as stream:
            np.save(stream, tensor.numpy())
    return directory


def all_tensors(source: Path) -> dict[str, torch.Tensor]:
    """Of a model.safetensors, as its own library reads it; names without "model."."""
    with safe_open(source / "model.safetensors", framework="pt") as file:
        return {name.removeprefix("model."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it has no iterator


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same float16 model in every form."""
    root = tmp_path_factory.mktemp("checkpoints")
    single = make_opt(root / "single", dtype="float16", layers=2)
    found = {
        "single": single,
        "sharded": make_opt(root / "sharded", dtype="float16", layers=2, max_shard_size="20KB"),
        "bin": make_opt(root / "bin", dtype="float16", layers=2, safe=False),
        "numpy": save_numpy(single, root / "numpy"),
        "bare": root / "bare",
    }
    shutil.copytree(single, found["bare"])
    save_file(all_tensors(single), found["bare"] / "model.safetensors")
    return found


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of them, to break."""
    return lambda kind: Path(shutil.copytree(originals[kind], tmp_path / kind))


@pytest.mark.parametrize("kind", SOURCES)
def test_every_form_gives_the_same_names_and_numbers(kind: str, originals: dict[str, Path]) -> None:
    expected = all_tensors(originals["single"])
    with Checkpoint(originals[kind]) as checkpoint:
        assert checkpoint.names() - {"lm_head.weight"} == set(expected)
        assert checkpoint.quantization is None
        for name, tensor in expected.items():
            read = checkpoint.read(name, tuple(tensor.shape))
            assert read.dtype == torch.float16
            assert torch.equal(read, tensor), name
            assert torch.equal(checkpoint.read(f"model.{name}", tuple(tensor.shape)), tensor)
            assert checkpoint.describe(name) == (torch.float16, tuple(tensor.shape))


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "bin"])
def test_what_is_located_can_be_read_in_place(kind: str, originals: dict[str, Path]) -> None:
    with Checkpoint(originals[kind]) as checkpoint:
        for name, tensor in all_tensors(originals["single"]).items():
            where = checkpoint.locate(name, tuple(tensor.shape))
            assert where is not None
            assert (where.dtype, where.shape, where.num_bytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
            fd = os.open(where.path, os.O_RDONLY)
            data = os.pread(fd, where.num_bytes, where.offset)
            os.close(fd)
            assert data == tensor.numpy().tobytes()


def test_bin_files_cannot_be_read_in_place(originals: dict[str, Path]) -> None:
    with Checkpoint(originals["bin"]) as checkpoint:
        assert checkpoint.locate(NORM, (32,)) is None
        with pytest.raises(Invalid, match=r"tensor decoder.nothing is missing"):
            checkpoint.locate("decoder.nothing", (32,))


def test_tensors_outlive_the_checkpoint_and_writing_to_them_changes_no_file(copy: Callable[[str], Path]) -> None:
    path = copy("single")
    before = (path / "model.safetensors").read_bytes()
    with Checkpoint(path) as checkpoint:
        tensor = checkpoint.read(NORM, (32,))
    tensor.zero_()
    assert (path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_safetensors_is_read(dtype: str, tmp_path: Path) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(DTYPES[dtype])
    save_file({"a": torch.zeros(1, dtype=torch.int8), "x": tensor, "none": torch.empty(0, 4)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        read = checkpoint.read("x", (3, 4))
        assert read.dtype == tensor.dtype
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))
        assert checkpoint.read("none", (0, 4)).shape == (0, 4)


def test_a_tensor_may_begin_at_any_byte(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        }
    ).encode()
    data = bytes(3) + struct.pack("<2f", 1.5, -2.0)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    with Checkpoint(tmp_path) as checkpoint:
        read = checkpoint.read("x", (2,))
        assert read.tolist() == [1.5, -2.0]
        assert read.data_ptr() % read.itemsize == 0


@pytest.mark.parametrize("kind", SOURCES)
def test_a_missing_tensor_and_a_wrong_shape_are_named(kind: str, originals: dict[str, Path]) -> None:
    with Checkpoint(originals[kind]) as checkpoint:
        for ask in (checkpoint.read, checkpoint.locate):
            with pytest.raises(Invalid, match=r"tensor decoder.layers.7.fc1.weight is missing"):
                ask("decoder.layers.7.fc1.weight", (64, 32))
        with pytest.raises(Invalid, match=r"tensor decoder.layers.1.fc1.weight has shape \(64, 32\); config.json says"):
            checkpoint.read("decoder.layers.1.fc1.weight", (64, 33))


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("single", "model.safetensors"),
        ("sharded", "model-00002-of-*.safetensors"),
        ("numpy", "decoder.layers.0.fc1.weight"),
        ("bin", "pytorch_model.bin"),
    ],
)
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.9999])
def test_a_file_that_is_cut_short_is_named(kind: str, file: str, kept: float, copy: Callable[[str], Path]) -> None:
    path = copy(kind)
    (broken,) = path.glob(file)
    os.truncate(broken, int(broken.stat().st_size * kept))
    with pytest.raises(Invalid, match=broken.name) as error:
        read_all(path)
    if kept > 0.1 and kind != "bin":
        assert "is cut short" in str(error.value)
        assert "download or save it again" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("single", "model.safetensors"),
        ("sharded", "model-00002-of-*.safetensors"),
        ("numpy", "decoder.layers.0.fc1.weight"),
        ("bin", "pytorch_model.bin"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(kind: str, file: str, copy: Callable[[str], Path]) -> None:
    path = copy(kind)
    (broken,) = path.glob(file)
    broken.unlink()
    broken.mkdir()  # nobody can read a directory, not even root
    with pytest.raises(Invalid, match=f"cannot read .*{broken.name}: Is a directory"):
        read_all(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "does not describe tensors"),
        (b"[1, 2]", "does not describe tensors"),
        (b"[" * 100_000, "does not describe tensors"),
        (b'{"x": {"dtype": "F32", "shape": [2]}}', "does not describe tensors"),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "longer than its header says"),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}}', "cut short"),
        (b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', "which is not its shape"),
        (b'{"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}', "which is not its shape"),
        (b'{"x": {"dtype": "F32", "data_offsets": [0, 8]}}', "does not describe x"),
        (b'{"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}', "has dtype F4"),
        (
            b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "y": {"data_offsets": [0, 8]}}',
            "not within its data",
        ),
    ],
)
def test_a_damaged_header_is_explained(header: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(Invalid, match=message), Checkpoint(tmp_path) as checkpoint:
        checkpoint.read("x", (2,))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "../other.safetensors"}, "is not a file beside it"),
        ({"x": "absent.safetensors"}, "cannot read .*absent.safetensors: No such file"),
        ({"x": "there.safetensors"}, "there.safetensors holds tensor x, which it does not"),
        ("nothing", "has no weight_map"),
    ],
)
def test_an_index_that_is_wrong_is_explained(weight_map: object, message: str, tmp_path: Path) -> None:
    save_file({"y": torch.zeros(2)}, tmp_path / "there.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(Invalid, match=message), Checkpoint(tmp_path) as checkpoint:
        checkpoint.read("x", (2,))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.asfortranarray(np.ones((64, 32), dtype=np.float16)), "Fortran order"),
        (np.array([None, "x"], dtype=object), "dtype object"),
        (np.ones((64, 32), dtype=">f2"), "dtype >f2"),
        (np.ones((64, 32), dtype=np.complex64), "dtype complex64"),
    ],
)
def test_a_numpy_file_that_cannot_be_used_in_place_is_explained(
    array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], message: str, copy: Callable[[str], Path]
) -> None:
    path = copy("numpy")
    with (path / "decoder.layers.0.fc1.weight").open("wb") as stream:
        np.save(stream, array, allow_pickle=True)
    with pytest.raises(Invalid, match=message):
        read_all(path)


def test_code_in_a_bin_file_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"x": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Invalid, match="not a checkpoint that can be read safely"):
        Checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_directory_without_weights_says_what_would_be_some(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"holds no weights: no model.safetensors or pytorch_model.bin"):
        Checkpoint(tmp_path)


def test_a_numpy_directory_passes_inspection_and_a_broken_one_does_not(copy: Callable[[str], Path]) -> None:
    path = copy("numpy")
    assert inspect_model(path).num_layers == 2
    broken = path / "decoder.layer_norm.weight"
    kept = broken.read_bytes()
    for data, message in ((kept[:-1], "cut short"), (kept[:20], "not a whole .npy file")):
        broken.write_bytes(data)
        with pytest.raises(Invalid, match=f"{broken.name} is {message}"):
            inspect_model(path)
    broken.unlink()
    with pytest.raises(Invalid, match=f"tensor {NORM} is missing"):
        inspect_model(path)
    with broken.open("wb") as stream:
        np.save(stream, np.zeros(33, dtype=np.float16))
    with pytest.raises(Invalid, match=f"tensor {NORM} has shape 33; config.json says 32"):
        inspect_model(path)


def read_all(path: Path) -> None:
    with Checkpoint(path) as checkpoint:
        for name in sorted(checkpoint.names()):
            checkpoint.read(name, checkpoint.describe(name).shape)
