"""A server in a process of its own, as a user starts it."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from flexalign.generation.responses import Response, generate_responses
from flexalign.inra import InRaModel
from server_process import KEY, Server, messages

_VARIABLES = {
    "FLEXALIGN_TEST_KEY": KEY,
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
_PROGRAM = ("-c", "from flexalign.cli.app import main; main()")


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Call ``flexalign serve ARGS… --port 0``; whatever still runs in the end is ended."""
    processes = []

    def start(*args: str, program: Sequence[str] = _PROGRAM, port: int = 0) -> Server:
        log = tmp_path_factory.mktemp("server") / "stderr"
        command = [sys.executable, *program, "serve", "--port", str(port), *args]
        with log.open("w") as stderr:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **_VARIABLES},
            )
        processes.append(process)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), log.read_text()
        return Server(process, url, log)

    yield start
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="session")
def server(start_server: Any) -> Server:
    """The miniature with its dial, behind a key."""
    dial = ("miniature", "--adapter", "miniature:fast", "--lambda-range=-1,2")
    more = ("--queue", "40", "--api-key-env", "FLEXALIGN_TEST_KEY", "--playground")
    return start_server(*dial, *more)


@pytest.fixture(scope="session")
def start_vllm(start_server: Any) -> Callable[..., Server]:
    """The same dial on vLLM, as it runs on this machine's CPU."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here; make test-full runs this in .venv-vllm")

    def start(*args: str, port: int = 0, adapter: str = "miniature:fast") -> Server:
        dial = ("miniature", "--adapter", adapter, "--lambda-range=-1,2")
        more = ("--engine", "vllm", "--dtype", "float32", *args)
        return start_server(*dial, *more, "--", "--enforce-eager", "--block-size", "32", port=port)

    return start


@pytest.fixture(scope="session")
def vllm_server(start_vllm: Any) -> Server:
    """One behind a key."""
    return start_vllm("--api-key-env", "FLEXALIGN_TEST_KEY")


@pytest.fixture(scope="session", params=["local", pytest.param("vllm", marks=pytest.mark.full)])
def either(request: pytest.FixtureRequest) -> Server:
    """The server of each engine, as far as this environment has them."""
    names = {"local": "server", "vllm": "vllm_server"}
    server: Server = request.getfixturevalue(names[request.param])
    return server


@pytest.fixture(scope="session")
def alone() -> Callable[..., Response]:
    """What the library writes for one question, alone."""
    model = InRaModel.from_pretrained("miniature", "miniature:fast")
    model.inra_config = replace(model.inra_config, lambda_range=(-1.0, 2.0))

    def write(question: str, lam: float, tokens: int, **more: Any) -> Response:
        [response] = generate_responses(
            model,
            model.tokenizer,
            [messages(question)],
            max_new_tokens=tokens,
            lam=[lam],
            **{"temperature": 0, **more},
        )
        return response

    return write


@pytest.fixture
def serve_here() -> Iterator[Callable[..., Any]]:
    """Serve a model in this process; return the application."""
    from flexalign.serving.app import create_app
    from flexalign.serving.server import ServeOptions, load_service

    engines = []

    def start(model: object, **options: Any) -> Any:
        service, rules = load_service(ServeOptions(str(model), dtype="float32", **options))
        engines.append(service.engine)
        return create_app(service, rules)

    yield start
    for engine in engines:
        engine.stop()
