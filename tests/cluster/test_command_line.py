"""The command line as a user meets it: results, mistakes, examples."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_opt

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("model"))


def coordinator(*arguments: object, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "asyncpipe_coordinator", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | env,
    )


def assert_one_clear_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("asyncpipe-coordinator: error: ")
    for word in words:
        assert word in lines[0]


def edit_config(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def test_generate_prints_the_text_and_one_summary() -> None:
    result = coordinator("generate", "--stages", 2, "--prompt", "import ", "--max-new-tokens", 12)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("import ")
    assert len(result.stderr.strip().splitlines()) == 2
    for word in ("12 tokens", "tokens/s", "first token after", "stage 0", "stage 1", "bubble", "efficiency"):
        assert word in result.stderr


def test_generate_json_has_one_object_a_prompt_in_order(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"second"\n{"prompt": "third"}\n')
    arguments = ("generate", checkpoint, "--json", "--prompt", "first", "--prompt-file", prompts, "--max-new-tokens", 4)
    result = coordinator(*arguments, "--ignore-eos")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["first", "second", "third"]
    for row in rows:
        assert len(row["token_ids"]) == 4
        assert row["prompt_token_ids"][0] == 2
        assert row["finish_reason"] == "length"
        assert row["usage"]["completion_tokens"] == 4
        assert isinstance(row["text"], str)
    assert json.loads(result.stderr)["summary"]["completion_tokens"] == 12


def test_prompts_come_from_standard_input(checkpoint: Path) -> None:
    result = coordinator("generate", checkpoint, "--json", "--max-new-tokens", 2, stdin="one\n\ntwo\n")
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["one", "two"]


def test_a_flag_can_come_from_the_environment(checkpoint: Path) -> None:
    result = coordinator("generate", checkpoint, "--json", "--prompt", "a", "--ignore-eos", ASYNCPIPE_MAX_NEW_TOKENS="3")
    assert len(json.loads(result.stdout)["token_ids"]) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", ""), ["empty"]),
        (("--prompt", "a", "--stages", "5"), ["--stages 5", "4 layers"]),
        (("--prompt", "a", "--stages", "0"), ["--stages 0"]),
        (("--prompt", "a", "--stages", "2", "--split", "1,2"), ["--split 1,2", "3 layers", "has 4"]),
        (("--prompt", "a", "--stages", "2", "--split", "4"), ["2 stages"]),
        (("--prompt", "a", "--temperature", "-1"), ["temperature", "-1"]),
        (("--prompt", "a", "--top-p", "1.5"), ["top_p"]),
        (("--prompt", "a", "--max-new-tokens", "0"), ["max_new_tokens"]),
        (("--prompt", "a", "--max-new-tokens", "99999999999"), ["max_new_tokens"]),
        (("--prompt", "a", "--micro-batches", "-3"), ["--micro-batches"]),
        (("--prompt", "a", "--dtype", "float8"), ["--dtype", "float32"]),
        (("--prompt", "a", "--kv-dtype", "float8"), ["--kv-dtype", "float16"]),
        (("--prompt", "a", "--device", "tpu"), ["--device"]),
        (
            (
                "--prompt",
                "a b " * 200,
            ),
            ["context", "at most 159"],
        ),
        (("--prompt-file", "/no/such/file"), ["/no/such/file"]),
    ],
)
def test_a_bad_argument_is_one_clear_line(checkpoint: Path, arguments: tuple[str, ...], words: list[str]) -> None:
    assert_one_clear_line(coordinator("generate", checkpoint, *arguments, "--quiet"), *words)


def test_an_unknown_flag_shows_the_usage_and_exits_with_2() -> None:
    result = coordinator("generate", "--no-such-flag")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_models_that_cannot_be_loaded_are_one_clear_line(checkpoint: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(checkpoint, tmp_path / name))

    def refuse(path: object, *words: str) -> None:
        assert_one_clear_line(coordinator("generate", path, "--prompt", "a", "--quiet", HF_HUB_OFFLINE="1"), *words)

    refuse(tmp_path / "nowhere", "no directory")
    refuse("facebook/opt-nothing", "not in the hub's local cache", "HF_HUB_OFFLINE")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "not a checkpoint", "config.json")
    edit_config(path := broken("architecture"), architectures=["BertModel"])
    refuse(path, "BertModel", "supported: OPTForCausalLM")
    (path := broken("weightless") / "model.safetensors").unlink()
    refuse(path.parent, "no weights")
    file = broken("truncated") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse(file.parent, "cut short", "model.safetensors")
    file = broken("corrupt") / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 20) + b"\xff" * 40)
    refuse(file.parent, "damaged", "model.safetensors")
    edit_config(path := broken("wrong-shape"), ffn_dim=48)
    refuse(path, "fc1", "64", "48")
    edit_config(path := broken("missing"), num_hidden_layers=5)
    refuse(path, "decoder.layers.4", "missing")


def test_a_worker_that_cannot_start_shows_its_last_lines(checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoint, tmp_path / "bin"))
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"this is no checkpoint")
    assert_one_clear_line(coordinator("generate", path, "--prompt", "a", "--quiet"), "pytorch_model.bin")


def test_a_worker_without_torch_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util as u; f = u.find_spec;"
        "u.find_spec = lambda n, *a: None if n == 'torch' else f(n, *a);"
        "from asyncpipe_workers.cli import main; sys.exit(main(['--coordinator', 'ipc://@nobody']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2
    assert "pip install 'asyncpipe-runtime[worker]'" in result.stderr


def test_status_shows_a_running_coordinator(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "asyncpipe_coordinator", "serve", str(checkpoint), "--stages", "2", "--json"]
    with subprocess.Popen([*command, "--bind", "tcp://127.0.0.1:0"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        shown, as_json = coordinator("status", address), coordinator("status", address, "--json")
        process.terminate()
    for word in ("running", "efficiency", "KV memory", "stage 0: layers 0-1 on cpu", "stage 1: layers 2-3 on cpu"):
        assert word in shown.stdout
    assert [stage["layers"] for stage in json.loads(as_json.stdout)["stages"]] == [[0, 2], [2, 4]]


def test_status_of_nobody_is_one_clear_line() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        result = coordinator("status", f"tcp://127.0.0.1:{unused.getsockname()[1]}")
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_port_in_use_is_one_clear_line(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        assert_one_clear_line(coordinator("serve", checkpoint, "--bind", bind), bind, "in use")


def test_a_public_address_is_refused_without_keys(checkpoint: Path) -> None:
    assert_one_clear_line(coordinator("serve", checkpoint, "--bind", "tcp://0.0.0.0:0"), "keys")


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_every_example_runs(name: str) -> None:
    result = subprocess.run([sys.executable, ROOT / "examples" / name], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize("code", ["import asyncpipe", "import asyncpipe_coordinator.cli as c; c.build_parser().format_help()"])
def test_imports_stay_light(code: str) -> None:
    """Beside the libraries that both need, in processor time and side by side, so a slow or busy machine changes little."""
    check = f"import sys; {code}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    rounds = [(processor_seconds(check), processor_seconds("import asyncio, msgspec, numpy, zmq")) for _ in range(5)]
    ours, libraries = (min(column) for column in zip(*rounds, strict=True))
    assert ours < 2.5 * libraries


def processor_seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_chat_wraps_prompts_in_the_checkpoints_template_and_shows_the_answer(checkpoint: Path, tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint, tmp_path / "chat")
    flags = ("--max-new-tokens", 5, "--quiet")
    assert_one_clear_line(coordinator("generate", path, "--chat", "--prompt", "to be"), "has no chat template")
    (path / "chat_template.jinja").write_text("</s>{{ messages[0].content }} or")
    answer = coordinator("generate", path, "--chat", "--prompt", "to be", *flags)
    plain = coordinator("generate", path, "--prompt", "to be or", *flags)
    assert answer.returncode == plain.returncode == 0, answer.stderr
    assert "to be or" + answer.stdout == plain.stdout
