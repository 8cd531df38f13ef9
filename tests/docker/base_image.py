"""A base image without a registry: Debian by mmdebstrap, in which pip finds packages as it does on this machine."""

from __future__ import annotations

import ast
import contextlib
import functools
import http.server
import os
import ssl
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

from tests.docker.engine import Engine, Unavailable

SUITE = "bookworm"  # with Python 3.11, the oldest one that we support
PACKAGES = "ca-certificates,python3,python3-pip,python3-venv"
BOOTSTRAP_TIMEOUT_S = 900.0
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"  # Debian's place for it
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")
# What of pip's configuration says where packages are. Its other settings are this machine's own.
PIP_LOCATIONS = ("index-url", "extra-index-url", "find-links")
PIP_PLAIN = ("no-index", "trusted-host", "proxy", "retries", "timeout", "default-timeout", "prefer-binary")


@contextlib.contextmanager
def a_base_image(engine: Engine, name: str) -> Iterator[list[str]]:
    """Make the image `name`; gives the arguments of `docker build` with which images are built from it, while this is open.

    Raises Unavailable when Debian's packages cannot be reached.
    """
    with LocalFolders() as folders:
        configuration, archive = engine.folder / "pip.conf", engine.folder / "base.tar"
        configuration.write_text(pip_configuration(folders))
        _bootstrap(archive, configuration)
        engine.docker("import", str(archive), name)
        archive.unlink()
        proxies = [variable for variable in os.environ if variable.lower() in PROXIES]
        arguments = [f"--build-arg={variable}={os.environ[variable]}" for variable in proxies]
        yield ["--network=host", f"--build-arg=BASE={name}", "--build-arg=TORCH_INDEX=", *arguments]


def _bootstrap(archive: Path, configuration: Path) -> None:
    command = ["mmdebstrap", "--variant=minbase", f"--include={PACKAGES}"]
    command += [f"--customize-hook=upload {configuration} /etc/pip.conf"]
    if (authorities := _authorities()) is not None:
        command += [f"--customize-hook=upload {authorities} {CA_BUNDLE}"]
    done = subprocess.run([*command, SUITE, str(archive)], capture_output=True, text=True, timeout=BOOTSTRAP_TIMEOUT_S)
    if done.returncode != 0:
        raise Unavailable(f"mmdebstrap cannot make a base image:\n{done.stderr[-1000:]}")


def _authorities() -> str | None:
    """This machine's: behind a proxy that reads along, no others will do."""
    path = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
    return path if path is not None and Path(path).is_file() else None


# --- pip's configuration ----------------------------------------------------------------------------------------------


def pip_configuration(folders: LocalFolders) -> str:
    """A pip.conf that says of places what `pip config` says here, with folders of this machine as addresses of `folders`."""
    lines = ["[global]", f"cert = {CA_BUNDLE}"]
    for key, value in _pip_settings().items():
        if key in PIP_LOCATIONS:
            lines.append(f"{key} = {' '.join(folders.address_of(place, is_index='index' in key) for place in value.split())}")
        elif key in PIP_PLAIN:
            lines.append(f"{key} = {value}")
    return "\n".join([*lines, ""])


def _pip_settings() -> dict[str, str]:
    """The environment's (:env:) win over those for `pip install`, and those over the global ones."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed:
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in found:
            found[section][key] = ast.literal_eval(value)
    return found["global"] | found["install"] | found[":env:"]


class LocalFolders:
    """Serves folders with packages on the loopback interface, which builds with the host's network can reach."""

    def __init__(self) -> None:
        self._shared: list[Path] = []
        handler = functools.partial(_Handler, shared=self._shared)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="local packages", daemon=True)

    def __enter__(self) -> LocalFolders:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def address_of(self, place: str, *, is_index: bool) -> str:
        """Of a folder, as a path or a file: address; any other `place` is returned as it is.

        An index may refer to files beside itself, so its parent folder is served with it.
        """
        path = Path(urllib.parse.unquote(urllib.parse.urlsplit(place).path)) if place.startswith("file:") else Path(place)
        if not (path.is_absolute() and path.is_dir()):
            return place
        self._shared.append(path.parent if is_index else path)
        return f"http://127.0.0.1:{self._server.server_port}{urllib.parse.quote(str(path))}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *arguments: object, shared: list[Path]) -> None:
        self._shared = shared
        super().__init__(*arguments, directory="/")  # type: ignore[arg-type]

    def send_head(self):  # type: ignore[no-untyped-def]
        path = Path(self.translate_path(self.path))
        if not any(path.is_relative_to(folder) for folder in self._shared):
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        return super().send_head()

    def log_message(self, *_: object) -> None:
        """Quiet."""
