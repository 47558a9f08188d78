"""Engines of vLLM, and what their answers are held against."""

import copy
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from flexalign.heads import Head
from flexalign.inra import InRaModel
from flexalign.lambdas import Schedule
from flexalign.lora_dial import LoRADialConfig
from flexalign.models.loading import fingerprint
from flexalign.models.sources import resolve
from flexalign.serving.vllm.folder import prepare_folder
from twin import fuse64

_ENGINE = Path(__file__).with_name("engine_process.py")
_REASON = "vLLM is not installed here; make test-full runs this in .venv-vllm"


@pytest.fixture(scope="session")
def vllm() -> ModuleType:
    """vLLM, in this process."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip(_REASON)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("vllm")


class Dialled(NamedTuple):
    """A base with an adapter that is not the identity.

    Attributes:
        folder: What vLLM loads.
        model: Both, in transformers.
        adapter_stream: A plain model one layer deeper, whose first layer is the adapter.
        tags: The tokens that open and close the thinking.
        default: λ of a request without one.
    """

    folder: Path
    model: InRaModel
    adapter_stream: Any
    tags: tuple[int, int]
    default: float = 0.0

    def logits(self, tokens: list[int], lams: list[float]) -> Tensor:
        """Equation 5 in float64 over two whole models: (T, V), one λ per position."""
        ids = torch.tensor([tokens])
        with torch.no_grad():
            base, adapter = self.model.base(ids).logits[0], self.adapter_stream(ids).logits[0]
        return fuse64(base, adapter, torch.tensor(lams))

    def lambdas(self, dial: Any, tokens: list[int], prompt_length: int) -> list[float]:
        """λ at every position, from the whole sequence."""
        return followed(dial, tokens, prompt_length, self.tags)


class LoRADialled(NamedTuple):
    """A base with a LoRA dial.

    Attributes:
        base: The base's folder.
        adapter: The LoRA's.
        folder: What vLLM loads.
        model: Both, as PEFT has them.
        tags: The tokens that open and close the thinking.
        default: λ of a request without one.
    """

    base: Path
    adapter: Path
    folder: Path
    model: Any
    tags: tuple[int, int]
    default: float = 0.75

    def logits(self, tokens: list[int], lams: list[float]) -> Tensor:
        """One forward in float64 whose LoRA layers are W·x + λ·s·B·(A·x), λ per position: (T, V)."""
        factor = torch.tensor(lams, dtype=torch.float64)[:, None]
        model = copy.deepcopy(self.model).double()
        for layer in [m for m in model.modules() if isinstance(m, LoraLayer)]:
            layer.forward = partial(_scaled, layer, factor)
        with torch.no_grad():
            logits: Tensor = model(torch.tensor([tokens])).logits[0]
        return logits

    def lambdas(self, dial: Any, tokens: list[int], prompt_length: int) -> list[float]:
        """λ at every position: over the whole prompt that of the first generated token."""
        lams = followed(dial, tokens, prompt_length, self.tags)
        return [lams[prompt_length - 1]] * (prompt_length - 1) + lams[prompt_length - 1 :]


def _scaled(layer: Any, factor: Tensor, x: Tensor) -> Tensor:
    low = layer.lora_B["default"](layer.lora_A["default"](x))
    total: Tensor = layer.base_layer(x) + factor * layer.scaling["default"] * low
    return total


def followed(
    dial: Any, tokens: list[int], prompt_length: int, tags: tuple[int, int]
) -> list[float]:
    """λ at every position, each by its own place."""
    if isinstance(dial, float):
        return [dial] * len(tokens)
    schedule, lams = Schedule.parse(dial), []
    for end in range(1, len(tokens) + 1):
        opened, closed = (
            max((i for i, token in enumerate(tokens[:end]) if token == tag), default=-1)
            for tag in tags
        )
        index = max(0, end - prompt_length)
        where = {"inside": opened > closed, "thinking_tokens": end - 1 - opened}
        lams.append(schedule.at(index, **where))
    return lams


@pytest.fixture(scope="session")
def dialled(tmp_path_factory, tiny_model, tiny_tokenizer) -> Callable[..., Dialled]:
    """Make a family's tiny model with an adapter; what its head_dim must be, vLLM on CPUs says."""

    def make(family: str, noise: float = 0.1, adapter_layers: int = 1, **config: Any) -> Dialled:
        settings = {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.2} | config
        base = tiny_model(family, **settings)
        where = tmp_path_factory.mktemp(family)
        base.save_pretrained(where / "base")
        tiny_tokenizer.save_pretrained(where / "base")
        model = InRaModel.create(where / "base", adapter_layers=adapter_layers)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.adapter.parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(where / "adapter")
        folder = prepare_folder(where / "base", where / "adapter", where / "folder")
        deeper = tiny_model(family, **settings, num_hidden_layers=2 + adapter_layers)
        originals = (*model.adapter, *base.get_decoder().layers)
        for layer, original in zip(deeper.get_decoder().layers, originals, strict=True):
            layer.load_state_dict(original.state_dict())
        rest = {k: v for k, v in base.state_dict().items() if ".layers." not in k}
        deeper.load_state_dict(rest, strict=False)
        assert Head.of(deeper).weight.equal(Head.of(base).weight)
        tags = tiny_tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        return Dialled(folder, model.eval(), deeper, tuple(tags))

    return make


@pytest.fixture(scope="session")
def lora_dialled(tmp_path_factory, tiny_model, tiny_tokenizer) -> Callable[..., LoRADialled]:
    """Make a family's tiny model with a LoRA dial of several ranks and scalings."""

    def make(family: str, lora: dict[str, Any] | None = None, **config: Any) -> LoRADialled:
        settings = {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.2} | config
        base = tiny_model(family, **settings)
        where = tmp_path_factory.mktemp(family)
        base.save_pretrained(where / "base")
        tiny_tokenizer.save_pretrained(where / "base")
        lora = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 3}} | (lora or {})
        lora = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | lora
        torch.manual_seed(1)
        model = get_peft_model(base, LoraConfig(**lora, init_lora_weights=False)).eval()
        model.save_pretrained(where / "adapter")
        LoRADialConfig(
            str(where / "base"),
            fingerprint(resolve(where / "base")),
            lambda_range=(-1.0, 3.0),
            default_lambda=0.75,
        ).save(where / "adapter")
        folder = prepare_folder(where / "base", where / "adapter", where / "folder")
        tags = tiny_tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        return LoRADialled(where / "base", where / "adapter", folder, model, tuple(tags))

    return make


class Engine:
    """A running engine; see ``engine_process.py``."""

    def __init__(self, cache: Path, folder: Path, without: tuple[str, ...], options: Any) -> None:
        options = {
            "model": str(folder),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "block_size": 32,
            "max_num_seqs": 16,
            "disable_log_stats": False,
        } | options
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_CACHE_ROOT": str(cache),
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not without)),
        }
        command = [sys.executable, str(_ENGINE)]
        command.append(json.dumps({"options": options, "without": without}))
        self._errors = (cache / "errors.log").open("w+")
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def start(self) -> "Engine":
        """Wait until it serves."""
        if self._read() != "ready\n":
            raise RuntimeError(self.log())
        return self

    def __call__(self, *requests: dict[str, Any]) -> dict[str, Any]:
        """Run requests together: ``prompt`` and fields of ``SamplingParams``."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(requests) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read() or pytest.fail(self.log()))
        if "EngineDeadError" in answer.get("error", ""):
            pytest.fail(self.log())
        return answer

    def log(self) -> str:
        """All that it wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Callable[..., Engine]]:
    """Start engines: ``engine(folder, without=(), **options of LLM)``."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip(_REASON)
    cache = tmp_path_factory.mktemp("vllm_cache")
    engines: list[Engine] = []

    def start(folder: Path, without: tuple[str, ...] = (), **options: Any) -> Engine:
        while engines:  # one at a time: two engines would share what vLLM takes for one
            engines.pop().close()
        engines.append(Engine(cache, folder, without, options))
        return engines[-1].start()

    yield start
    while engines:
        engines.pop().close()
