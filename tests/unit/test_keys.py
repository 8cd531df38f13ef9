"""CURVE keys: where they are kept, what is refused, and the `keygen` command."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from asyncpipe.errors import Invalid
from asyncpipe.transport.base import LinkOptions
from asyncpipe.transport.key_files import KeyName, make_keys
from asyncpipe.transport.keys import KeyPair, Keys, load_keys
from asyncpipe_coordinator.cli import main

ALL = [KeyName("coordinator", "coordinator"), KeyName("worker", "default"), KeyName("client", "default")]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With a key of each kind."""
    make_keys(tmp_path / "keys", ALL)
    return tmp_path / "keys"


def loaded(directory: Path, role: str, **env: str) -> Keys:
    keys = load_keys(directory, role=role, env=env)
    assert keys is not None
    return keys


def modes(directory: Path) -> dict[str, int]:
    return {str(path.relative_to(directory)): stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*")}


# --- pairs and allow-lists --------------------------------------------------------------------------------------------


def test_no_repr_shows_a_secret() -> None:
    pair = KeyPair.new()
    for shown in (repr(pair), str(pair), repr(Keys(pair)), repr(LinkOptions(keys=Keys(pair)))):
        assert pair.secret not in shown and pair.public in shown


def test_a_secret_says_its_public_half() -> None:
    pair = KeyPair.new()
    assert KeyPair.of_secret(pair.secret, source="x") == pair
    assert pair.public == zmq.curve_public(pair.secret.encode()).decode()


@pytest.mark.parametrize("text", ["", "short", "x" * 39, "x" * 41, "#" * 40, '"' * 40, "é" * 40, "x" * 80])
def test_what_is_not_a_key_is_one_line_that_does_not_show_it(text: str) -> None:
    with pytest.raises(Invalid, match=r"^the file is not a CURVE secret key, 40 characters of Z85$"):
        KeyPair.of_secret(text, source="the file")
    with pytest.raises(Invalid, match=r"^the key of a worker is not a CURVE public key, 40 characters of Z85$"):
        Keys(KeyPair.new()).allow(text, "worker")


def test_a_key_has_the_roles_that_it_was_allowed_until_it_is_disallowed() -> None:
    keys, public = Keys(KeyPair.new()), KeyPair.new().public
    assert keys.roles_of(public) == frozenset()
    keys.allow(public, "worker")
    keys.allow(public, "client")
    assert keys.roles_of(public) == {"worker", "client"}
    keys.disallow(public)
    keys.disallow(public)
    assert keys.roles_of(public) == frozenset()


# --- directories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_secrets_are_for_their_owner_only_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        make_keys(tmp_path / "keys", ALL)
    finally:
        os.umask(before)
    assert modes(tmp_path) == {
        "keys": 0o700,
        "keys/coordinator.key": 0o644,
        "keys/coordinator.key_secret": 0o600,
        "keys/workers": 0o700,
        "keys/workers/default.key": 0o644,
        "keys/workers/default.key_secret": 0o600,
        "keys/clients": 0o700,
        "keys/clients/default.key": 0o644,
        "keys/clients/default.key_secret": 0o600,
    }


def test_each_role_finds_its_own_key_and_whom_it_deals_with(directory: Path) -> None:
    make_keys(directory, [KeyName("worker", "gpu.1")])
    coordinator, client = loaded(directory, "coordinator"), loaded(directory, "client")
    default, gpu = loaded(directory, "worker"), loaded(directory, "worker", ASYNCPIPE_KEY_NAME="gpu.1")
    assert {default.coordinator, gpu.coordinator, client.coordinator} == {coordinator.own.public}
    assert coordinator.coordinator is None
    assert coordinator.allowed == {
        default.own.public: {"worker"},
        gpu.own.public: {"worker"},
        client.own.public: {"client"},
    }
    assert default.allowed == gpu.allowed == client.allowed == {}
    for keys in (coordinator, default, gpu, client):
        assert zmq.curve_public(keys.own.secret.encode()).decode() == keys.own.public


def test_the_only_key_of_a_folder_needs_no_name_and_several_do(directory: Path) -> None:
    workers = directory / "workers"
    (workers / "default.key_secret").unlink()
    (made,) = make_keys(directory, [KeyName("worker", "a")])
    assert loaded(directory, "worker").own.public == made.public
    make_keys(directory, [KeyName("worker", "b")])
    with pytest.raises(Invalid, match=r"has several keys, a, b: name one of them in ASYNCPIPE_KEY_NAME$"):
        load_keys(directory, role="worker", env={})


def test_a_key_that_is_both_a_workers_and_a_clients_has_both_roles(directory: Path) -> None:
    (directory / "clients" / "default.key").write_bytes((directory / "workers" / "default.key").read_bytes())
    assert loaded(directory, "coordinator").allowed == {loaded(directory, "worker").own.public: {"worker", "client"}}


def remove(path: Path) -> None:
    path.unlink()


def let_others_read(path: Path) -> None:
    path.chmod(0o640)


def fill_with_noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


def cut_the_key_short(path: Path) -> None:
    path.write_text('metadata\ncurve\n    public-key = "abc"\n    secret-key = "abc"\n')


def leave_out_the_value(path: Path) -> None:
    path.write_text("curve\n    public-key\n")


def make_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir(mode=0o700)


def mix_two_pairs(path: Path) -> None:
    path.write_text(f'curve\n    public-key = "{KeyPair.new().public}"\n    secret-key = "{KeyPair.new().secret}"\n')


@pytest.mark.parametrize(
    ("role", "file", "damage", "complaint"),
    [
        ("worker", "workers/default.key_secret", remove, "workers has no NAME.key_secret, which a worker needs"),
        ("worker", "workers/default.key_secret", let_others_read, "that others may use (mode 640): chmod 600 "),
        ("worker", "workers/default.key_secret", fill_with_noise, "is not a key file"),
        ("worker", "workers/default.key_secret", cut_the_key_short, "is not a CURVE secret key, 40 characters of Z85"),
        ("worker", "workers/default.key_secret", leave_out_the_value, "is not a key file"),
        ("worker", "workers/default.key_secret", make_a_directory, "cannot be read: Is a directory"),
        ("worker", "workers/default.key_secret", mix_two_pairs, "its public-key is not that of its secret-key"),
        ("client", "coordinator.key", remove, "coordinator.key cannot be read: No such file or directory"),
        ("client", "coordinator.key", cut_the_key_short, "is not a CURVE public key, 40 characters of Z85"),
        ("coordinator", "coordinator.key_secret", remove, "coordinator.key_secret cannot be read: No such file or directory"),
        ("coordinator", "coordinator.key_secret", let_others_read, "chmod 600 "),
        ("coordinator", "clients/default.key", fill_with_noise, "clients/default.key is not a key file"),
        ("coordinator", "workers/default.key", cut_the_key_short, "is not a CURVE public key"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(
    directory: Path, role: str, file: str, damage: Callable[[Path], None], complaint: str
) -> None:
    damage(directory / file)
    with pytest.raises(Invalid) as caught:
        load_keys(directory, role=role, env={})
    line = str(caught.value)
    assert complaint in line and str((directory / file).parent) in line and "\n" not in line


def test_a_directory_that_is_not_there_is_one_line_that_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"keys is not a directory of keys; make one with asyncpipe-coordinator keygen .*keys$"):
        load_keys(tmp_path / "keys", role="client", env={})


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "-x", "a b", "x" * 65, "a\n"])
def test_a_name_that_would_leave_its_folder_is_refused(directory: Path, name: str) -> None:
    with pytest.raises(Invalid, match="cannot name a key"):
        make_keys(directory, [KeyName("worker", name)])
    if name.strip():
        with pytest.raises(Invalid):
            load_keys(directory, role="worker", env={"ASYNCPIPE_KEY_NAME": name})


def test_only_three_roles_have_keys(directory: Path) -> None:
    with pytest.raises(Invalid, match="'launcher' is no role with keys; use coordinator, worker or client"):
        load_keys(directory, role="launcher", env={})


# --- the environment --------------------------------------------------------------------------------------------------

OWN, COORDINATOR, A, B = (KeyPair.new() for _ in range(4))


@pytest.mark.parametrize("role", ["coordinator", "worker", "client"])
def test_nothing_given_is_no_keys(role: str) -> None:
    assert load_keys(None, role=role, env={}) is None
    assert load_keys(None, role=role, env={"ASYNCPIPE_KEYS": " ", "ASYNCPIPE_SECRET_KEY": ""}) is None


def test_keys_may_come_from_the_environment() -> None:
    env = {"ASYNCPIPE_SECRET_KEY": f" {OWN.secret}\n", "ASYNCPIPE_COORDINATOR_KEY": COORDINATOR.public}
    keys = load_keys(None, role="worker", env=env)
    assert keys is not None
    assert (keys.own, keys.coordinator, keys.allowed) == (OWN, COORDINATOR.public, {})


def test_a_coordinators_environment_lists_whom_it_allows() -> None:
    env = {
        "ASYNCPIPE_SECRET_KEY": OWN.secret,
        "ASYNCPIPE_ALLOWED_WORKERS": f"{A.public},{B.public}",
        "ASYNCPIPE_ALLOWED_CLIENTS": f"\n  {B.public} ,\t\n",
    }
    keys = load_keys(None, role="coordinator", env=env)
    assert keys is not None
    assert keys.allowed == {A.public: {"worker"}, B.public: {"worker", "client"}}


def test_a_directory_comes_before_the_environment_and_the_argument_before_both(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_keys(other, ALL)
    env = {"ASYNCPIPE_KEYS": str(directory), "ASYNCPIPE_SECRET_KEY": OWN.secret}
    from_environment = load_keys(None, role="coordinator", env=env)
    from_argument = load_keys(other, role="coordinator", env=env)
    assert from_environment is not None and from_environment.own == loaded(directory, "coordinator").own
    assert from_argument is not None and from_argument.own == loaded(other, "coordinator").own


@pytest.mark.parametrize(
    ("role", "env", "complaint"),
    [
        ("worker", {"ASYNCPIPE_SECRET_KEY": "no key"}, "ASYNCPIPE_SECRET_KEY is not a CURVE secret key, 40 characters of Z85"),
        (
            "worker",
            {"ASYNCPIPE_SECRET_KEY": OWN.secret},
            "ASYNCPIPE_SECRET_KEY is set, but ASYNCPIPE_COORDINATOR_KEY, which a worker needs, is not",
        ),
        (
            "client",
            {"ASYNCPIPE_COORDINATOR_KEY": A.public},
            "ASYNCPIPE_COORDINATOR_KEY is set, but ASYNCPIPE_SECRET_KEY is not",
        ),
        (
            "client",
            {"ASYNCPIPE_SECRET_KEY": OWN.secret, "ASYNCPIPE_COORDINATOR_KEY": "x"},
            "ASYNCPIPE_COORDINATOR_KEY is not a CURVE public key, 40 characters of Z85",
        ),
        (
            "coordinator",
            {"ASYNCPIPE_ALLOWED_WORKERS": A.public},
            "ASYNCPIPE_ALLOWED_WORKERS is set, but ASYNCPIPE_SECRET_KEY is not",
        ),
        (
            "coordinator",
            {"ASYNCPIPE_SECRET_KEY": OWN.secret, "ASYNCPIPE_ALLOWED_CLIENTS": f"{A.public};{B.public}"},
            "a key in ASYNCPIPE_ALLOWED_CLIENTS is not a CURVE public key, 40 characters of Z85",
        ),
    ],
)
def test_a_bad_environment_is_one_line_without_keys(role: str, env: dict[str, str], complaint: str) -> None:
    with pytest.raises(Invalid) as caught:
        load_keys(None, role=role, env=env)
    assert str(caught.value) == complaint
    assert caught.value.__cause__ is None


# --- keygen -----------------------------------------------------------------------------------------------------------


def secrets_in(directory: Path) -> list[str]:
    lines = "\n".join(path.read_text() for path in directory.rglob("*.key_secret")).splitlines()
    return [line.partition("=")[2].strip(' "') for line in lines if "secret-key" in line]


def test_keygen_makes_a_key_of_each_kind_and_says_where_they_belong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["keygen"]) == 0
    said = capsys.readouterr().out
    assert "worker default: workers/default.key_secret, coordinator.key\n" in said
    assert "coordinator: coordinator.key_secret, workers/*.key, clients/*.key\n" in said
    secrets = secrets_in(tmp_path / "asyncpipe-keys")
    assert len(secrets) == 3
    assert not any(secret in said for secret in secrets)
    assert loaded(tmp_path / "asyncpipe-keys", "worker").coordinator is not None


def test_keygen_adds_keys_by_name_and_says_so_as_json(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = modes(directory)
    assert main(["keygen", str(directory), "--worker", "gpu1", "--worker", "gpu2", "--client", "alice", "--json"]) == 0
    said = capsys.readouterr().out
    result = json.loads(said)
    assert result["directory"] == str(directory)
    assert [(key["role"], key["name"]) for key in result["keys"]] == [
        ("worker", "gpu1"),
        ("worker", "gpu2"),
        ("client", "alice"),
    ]
    gpu1 = result["keys"][0]
    assert gpu1["public_key"] == loaded(directory, "worker", ASYNCPIPE_KEY_NAME="gpu1").own.public
    assert (gpu1["public_file"], gpu1["secret_file"]) == (
        str(directory / "workers/gpu1.key"),
        str(directory / "workers/gpu1.key_secret"),
    )
    assert gpu1["copy"] == ["workers/gpu1.key_secret", "coordinator.key"]
    assert set(modes(directory)) - set(before) == {
        f"{base}{suffix}" for base in ("workers/gpu1", "workers/gpu2", "clients/alice") for suffix in (".key", ".key_secret")
    }
    assert not any(secret in said for secret in secrets_in(directory))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "coordinator.key exists already, and keys are never overwritten"),
        (["--worker", "new", "--client", "default"], "clients/default.key exists already"),
        (["--worker", "new", "--worker", "new"], "worker new was named twice"),
        (["--worker", "new", "--client", "../x"], "'../x' cannot name a key"),
    ],
)
def test_keygen_never_overwrites_and_writes_all_or_nothing(
    directory: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert main(["keygen", str(directory), *flags]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and complaint in said.err
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_keygen_where_nothing_can_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert main(["keygen", str(tmp_path / "file" / "keys")]) == 2
    assert capsys.readouterr().err.startswith("asyncpipe-coordinator: error: cannot write ")


def test_status_with_bad_keys_is_a_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "tcp://127.0.0.1:9", "--keys", str(tmp_path / "none")]) == 2
    assert "none is not a directory of keys" in capsys.readouterr().err
