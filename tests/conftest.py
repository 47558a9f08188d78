"""What every test stands on: no network, one thread, seeds, and models built on the spot.

Fixtures for all tests:

* ``tiny_tokenizer``: a real byte-level BPE tokenizer with special tokens and a chat template.
* ``hybrid_tokenizer``: that tokenizer with a template that reads ``enable_thinking``.
* ``hybrid_folder``: a model's folder with that tokenizer.
* ``tiny_model(family="qwen2", vocab_size=None, seed=0, **config)``: a two-layer random model.
* ``tiny_pair``: ``(reference, aligned)``, two model folders with that tokenizer. Read only.
* ``renamed_pair``: the same weights; the aligned model's special tokens have other names.
* ``run_cli(*args)``: the command line, in this process, with what it printed.
* ``serve(answer)``: a server of OpenAI's protocol on the loopback.
"""

import atexit
import os
import tempfile

_hub = tempfile.TemporaryDirectory(prefix="flexalign-tests-")
atexit.register(_hub.cleanup)
os.environ.update(
    HF_HOME=_hub.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
    MPLBACKEND="Agg",
    COLUMNS="200",
    TERM="dumb",
    NO_COLOR="1",
)
for _name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
    os.environ.pop(_name, None)

import contextlib
import copy
import io
import ipaddress
import random
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import numpy
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from chat_server import Answer, Chat

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
hypothesis.settings.register_profile("offline", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile(
    "mutation",  # of tools/mutation.py: that a test fails is all it asks, by which example it is not
    hypothesis.settings.get_profile("offline"),
    max_examples=30,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "offline"))

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HYBRID_TEMPLATE = (
    "{%- set ns = namespace(turns=0) %}"
    "{% for message in messages %}"
    "{% if message.role != 'system' or not drop_system %}"
    "<|im_start|>{{ message.role }}\n"
    "{% generation %}{{ message.content }}{% endgeneration %}<|im_end|>\n"
    "{% if loop.first %}{% set ns.turns = 1 %}{% continue %}{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)
"""A template with a switch for the thinking, as DeepSeek's and GLM's have one."""
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
RENAMED_TOKENS = {
    "<|im_start|>": "<|User|>",
    "<|im_end|>": "<|end_of_sentence|>",
    "<think>": "<|box_start|>",
    "</think>": "<|box_end|>",
}
"""Special tokens and their names in the aligned model of ``renamed_pair``."""
CORPUS = (
    "user assistant system what is one plus two plus three",
    "the answer is six because one and two make three and three more make six",
    "1+2=3 3+3=6 again 12+34=46 check 46+5=51",
)


class Result(NamedTuple):
    """What a command line run left behind."""

    exit_code: int
    stdout: str
    stderr: str


class TinyPair(NamedTuple):
    """Two model folders with one tokenizer."""

    reference: Path
    aligned: Path


def _is_loopback(host: str) -> bool:
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _require_local(family: int, address: Any) -> None:
    if family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(str(address[0])):
        raise OSError(f"the tests run offline: a connection to {address} was refused")


class _LocalSocket(socket.socket):
    """A socket that reaches this machine and no other."""

    def connect(self, address: Any) -> None:
        _require_local(self.family, address)
        super().connect(address)

    def connect_ex(self, address: Any) -> int:
        _require_local(self.family, address)
        return super().connect_ex(address)

    def sendto(self, data: Any, *args: Any) -> int:
        _require_local(self.family, args[-1])
        return super().sendto(data, *args)


_resolve = socket.getaddrinfo


def _resolve_local(host: Any, *args: Any, **kwargs: Any) -> Any:
    name = host.decode() if isinstance(host, bytes) else host
    if name is not None and not _is_loopback(name):
        raise OSError(f"the tests run offline: the name {name!r} was not looked up")
    return _resolve(host, *args, **kwargs)


socket.socket = _LocalSocket  # type: ignore[misc]
socket.getaddrinfo = _resolve_local


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a CUDA device need one."""
    if torch.cuda.is_available():
        return
    for item in items:
        # Not `item.keywords`, which has the names of the folders above it too.
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over all 256 bytes, a few merges, ChatML with assistant masks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


@pytest.fixture
def hybrid_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy of the tokenizer whose template opens the thinking, or closes it where it is told."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = HYBRID_TEMPLATE
    return tokenizer


@pytest.fixture
def hybrid_folder(
    tiny_pair: TinyPair, hybrid_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    """A model's folder with that tokenizer."""
    folder = tmp_path / "hybrid"
    shutil.copytree(tiny_pair.reference, folder)
    hybrid_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """A factory of random two-layer models, width 64, in eval mode and float32."""

    def make(
        family: str = "qwen2", vocab_size: int | None = None, seed: int = 0, **config: Any
    ) -> PreTrainedModel:
        settings: dict[str, Any] = {
            "vocab_size": vocab_size or len(tiny_tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "pad_token_id": tiny_tokenizer.pad_token_id,
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
        }
        settings |= config
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
        return model.float().eval()

    return make


@pytest.fixture(scope="session")
def tiny_pair(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_model: Callable[..., PreTrainedModel],
) -> TinyPair:
    """A reference and an aligned model: the reference's weights plus a little noise."""
    folder = tmp_path_factory.mktemp("tiny_pair")
    pair = TinyPair(folder / "reference", folder / "aligned")
    model = tiny_model()
    generator = torch.Generator().manual_seed(1)
    for path in pair:
        model.save_pretrained(path)
        tiny_tokenizer.save_pretrained(path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return pair


@pytest.fixture(scope="session")
def renamed_pair(tmp_path_factory: pytest.TempPathFactory, tiny_pair: TinyPair) -> TinyPair:
    """The tiny pair, whose aligned model has other names for four special tokens, at equal ids."""
    folder = tmp_path_factory.mktemp("renamed_pair")
    pair = TinyPair(folder / "reference", folder / "aligned")
    for source, path in zip(tiny_pair, pair, strict=True):
        shutil.copytree(source, path)
    for path in pair.aligned.iterdir():
        if path.suffix in (".json", ".jinja"):
            text = path.read_text(encoding="utf-8")
            for name, other in RENAMED_TOKENS.items():
                text = text.replace(name, other)
            path.write_text(text, encoding="utf-8")
    return pair


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Call ``flexalign ARGS…`` in this process, through ``main`` as the console script does."""
    from flexalign.cli import app

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["flexalign", *map(str, args)])
        stdout, stderr = io.StringIO(), io.StringIO()
        exit_code = 0
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                app.main()
            except SystemExit as stop:
                exit_code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return Result(exit_code, stdout.getvalue(), stderr.getvalue())

    return run


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Chat]]:
    """Start servers of OpenAI's protocol on the loopback; see tests/chat_server.py."""
    chats: list[Chat] = []

    def start(answer: Answer) -> Chat:
        chats.append(Chat(answer))
        return chats[-1]

    yield start
    for chat in chats:
        chat.close()


@pytest.fixture
def pair(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    """Two models of one family that disagree often, in memory."""
    from flexalign.models.pair import ModelPair

    models = (tiny_model(seed=seed, initializer_range=0.1) for seed in (0, 1))
    return ModelPair.of(*models, tiny_tokenizer)


@pytest.fixture
def shared_pair(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    """A base and an adapter on it, in one module."""
    from peft import LoraConfig, get_peft_model

    from flexalign.models.pair import ModelPair

    base = tiny_model(initializer_range=0.1)
    config = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(base, config, adapter_name="tone").eval()
    return ModelPair.of(base, adapted, tiny_tokenizer)
