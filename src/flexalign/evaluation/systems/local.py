"""Systems on this machine: a model, a dial, a pair, or weights between two models."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from flexalign.errors import ConfigError
from flexalign.evaluation.systems.backend import (
    Answer,
    Cell,
    Key,
    Messages,
    Outcome,
    SystemOptions,
)
from flexalign.evaluation.systems.settings import AS_IT_IS, Setting
from flexalign.evaluation.systems.text import ModelText
from flexalign.fusion import as_lambda
from flexalign.generation import TwoModelDecoder
from flexalign.generation.responses import Response, generate_responses
from flexalign.inra import InRaModel
from flexalign.inra.configuration import check_folder, require_range
from flexalign.lambdas import Adaptive, Fixed, Route, require_forward
from flexalign.models.interpolation import interpolate
from flexalign.models.loading import fingerprint, load_model, load_tokenizer
from flexalign.models.pair import ModelPair
from flexalign.models.sources import resolve, resolve_adapter
from flexalign.models.weights import fingerprint_file


class LocalBackend:
    """A system whose weights are on this machine.

    Settings of an InRa dial share one batch and one prefill; of every other system each setting
    has its own, as one of a pair's models can rest at λ = 0 and 1.

    Attributes:
        kind: ``model``, ``dial``, ``pair`` or ``interpolate``.
        text: How its prompts are written and its responses read.
        default: Its setting where none is asked for.
        calibration: What was measured of an adapter's dial, if anything.
    """

    def __init__(
        self, kind: str, parts: Sequence[str], settings: Sequence[Setting], options: SystemOptions
    ) -> None:
        """Find and check what the system needs; no weights are loaded.

        Raises:
            ConfigError: If a model is not there, or a setting is not one that the kind takes.
            CheckpointError: If an adapter's folder is damaged.
            LambdaError: If a λ is outside the adapter's range, or below 0 for a pair, and not
                permitted.
        """
        self.kind, self._parts, self._options = kind, list(parts), options
        self._sources = [resolve(part) for part in parts[: 1 if kind == "dial" else 2]]
        self.default = Setting.of(1.0) if kind == "pair" else AS_IT_IS
        self._limits = options.lambda_range
        self.calibration: dict[str, Any] | None = None
        tags, config = None, None
        if kind == "dial":
            self._adapter = _adapter_folder(parts[1])
            config = check_folder(self._adapter)
            self.default = Setting.of(config.default_lambda)
            self._limits = self._limits or config.lambda_range
            self.calibration = config.calibration
            tags = config.tags
        self.require_range(settings)
        tokenizer = load_tokenizer(self._sources[0])
        if config is not None:
            config.bind(tokenizer)
        self.text = ModelText(tokenizer, tags)

    @property
    def permitted(self) -> tuple[float, float] | None:
        """The least and the largest λ that may be used; None for a pair's: any that is ≥ 0."""
        if self._limits is None:
            return None
        low, high = (float(as_lambda(limit)) for limit in self._limits)
        return low, high

    def require_range(self, settings: Sequence[Setting]) -> None:
        """Refuse settings that may use a λ outside the adapter's range, or the one permitted.

        A pair has no range of its own; without one it takes every λ ≥ 0.

        Raises:
            LambdaError: If there is one; says how to permit it.
        """
        dials = [(setting.id, setting.dial) for setting in settings if setting.dial is not None]
        if self.permitted is None:
            require_forward(dials, "start with --lambda-range LEAST,LARGEST")
        elif self.kind == "dial":
            require_range(self.permitted, dials, f"the adapter {self._parts[1]}")
        else:
            require_range(self.permitted, dials, f"the pair {','.join(self._parts)}")

    def describe(self) -> dict[str, Any]:
        """Names, fingerprints, the data type and the thinking tags."""
        parts = [{"name": str(s), "fingerprint": fingerprint(s)} for s in self._sources]
        if self.kind == "dial":
            weights = fingerprint_file(self._adapter / "inra_adapter.safetensors")
            parts.append({"name": self._parts[1], "fingerprint": weights})
        tags = self.text.tags
        return {
            "kind": self.kind,
            "parts": parts,
            "dtype": self._options.dtype,
            "thinking_tags": [tags.open, tags.close],
            "template": _digest(str(self.text.tokenizer.chat_template)),
        }

    def render(self, messages: Messages) -> str:
        """The prompt as the model sees it."""
        return self.text.render(messages)

    def run(self, cells: Sequence[Cell], done: Collection[Key]) -> Iterator[list[Outcome]]:
        """Make what is missing, block by block.

        A block that was broken off is made again as a whole, so that float differences between
        batches cannot make a resumed sweep differ from an uninterrupted one.
        """
        for group in self._groups(cells):
            blocks = self._blocks([cell for cell in cells if cell.setting in group], len(group))
            blocks = [block for block in blocks if any(cell.key not in done for cell in block)]
            if not blocks:
                continue
            with self._model(group[0]) as model:
                for block in blocks:
                    outcomes = zip(block, self._answer(model, block, len(group)), strict=True)
                    yield [(cell, answer) for cell, answer in outcomes if cell.key not in done]

    def _groups(self, cells: Sequence[Cell]) -> list[list[Setting]]:
        """The settings that are decoded together."""
        settings = list(dict.fromkeys(cell.setting for cell in cells))
        if self.kind != "dial":
            return [[setting] for setting in settings]
        alone = [[s] for s in settings if isinstance(s.dial, Adaptive | Route)]
        together = [s for s in settings if not isinstance(s.dial, Adaptive | Route)]
        return [together, *alone] if together else alone

    def _blocks(self, cells: list[Cell], settings: int) -> list[list[Cell]]:
        """Batches of prompts alike in length, the longest first; all settings of one together."""
        lengths = {(c.task, c.question): self.text.length(c.messages) for c in cells}
        places = {place: index for index, place in enumerate(lengths)}

        def order(cell: Cell) -> tuple[int, int, int]:
            place = (cell.task, cell.question)
            return -lengths[place], places[place], cell.sample

        ordered = sorted(cells, key=order)
        size = max(1, self._options.batch_size // settings) * settings
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def release(self) -> None:
        """Let go of the weights."""
        self.__dict__.pop("model", None)

    def _answer(self, model: Any, block: list[Cell], settings: int) -> list[Answer]:
        options = self._options
        dials = [_resolved(cell) for cell in block]
        more: dict[str, Any] = {}
        if self.kind in ("dial", "pair"):
            more = {"lam": [dial for dial, _ in dials], "gate": options.gate}
        responses = generate_responses(
            _OnePrefill(model, settings) if settings > 1 else model,
            self.text.tokenizer,
            [self.text.prompt(cell.messages) for cell in block],
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            batch_size=len(block),
            seeds=[cell.seed for cell in block],
            **more,
        )
        return [
            self._read(cell, response, route)
            for cell, response, (_, route) in zip(block, responses, dials, strict=True)
        ]

    def _read(self, cell: Cell, response: Response, route: str | None) -> Answer:
        text = self.text.whole(cell.messages, response.text)
        return Answer(
            text,
            response.tokens,
            self.text.thinking_tokens(text),
            response.rejected_tokens,
            response.truncated,
            route or response.route,
            response.confidence,
        )

    @contextmanager
    def _model(self, setting: Setting) -> Iterator[Any]:
        if self.kind != "interpolate":
            yield self.model
            return
        if setting.lam is None:
            raise ConfigError(f"weights are interpolated at a number, and {setting.id} is none.")
        with TemporaryDirectory(prefix="flexalign-") as scratch:
            reference, aligned = self._sources
            folder = interpolate(reference, aligned, setting.lam, Path(scratch) / "model")
            yield self._placed(load_model(folder, dtype=self._options.dtype))

    @cached_property
    def model(self) -> Any:
        """What generates, loaded when it is first asked for; not of weights between two models."""
        dtype = self._options.dtype
        if self.kind == "model":
            return self._placed(load_model(self._sources[0], dtype=dtype))
        if self.kind == "pair":
            device = self._device
            pair = ModelPair.load(*self._sources, dtype=dtype, device_map=device)
            return TwoModelDecoder(pair)
        base, any_base = self._parts[0], self._options.any_base
        return self._placed(
            InRaModel.from_pretrained(base, self._adapter, any_base=any_base, dtype=dtype)
        )

    @property
    def _device(self) -> str | None:
        return "cuda" if torch.cuda.is_available() else None

    def _placed(self, model: Any) -> Any:
        return model if self._device is None else model.to(self._device)


class _OnePrefill:
    """An InRa model whose ``generate`` makes one prefill for each prompt's several λ."""

    def __init__(self, model: Any, settings: int) -> None:
        self._model, self._settings = model, settings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, lam: list[Any], **options: Any
    ) -> Any:
        """Generate for prompts that each stand in as many equal rows as there are settings."""
        n = self._settings
        return self._model.sweep(input_ids[::n], attention_mask[::n], lams=lam[:n], **options)


def _resolved(cell: Cell) -> tuple[Any, str | None]:
    """A cell's dial; a coin falls by the cell's own seed, not by its batch."""
    dial = cell.setting.dial
    if not isinstance(dial, Route):
        return dial, None
    way = dial.draw(torch.Generator().manual_seed(cell.seed))
    return Fixed(dial.fast_lambda if way == "fast" else dial.slow_lambda), way


def _adapter_folder(name: str) -> Path:
    path = resolve_adapter(name)
    if not path.is_dir():
        raise ConfigError(
            f"there is no adapter {name!r}: it is no folder here; give one that flexalign adapt "
            "or InRaModel.save_pretrained wrote."
        )
    return path


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
