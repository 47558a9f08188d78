"""Systems on this machine: a model, a dial, a scaled LoRA, a pair, two prompts, or weights between
two models."""

import hashlib
import json
import warnings
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from flexalign.data.prompting import PromptSettings
from flexalign.data.rendering import Opening, Prompt, RenderedPrompt, Rendering
from flexalign.data.template import template_arguments
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, PairMismatchError
from flexalign.generation import TwoModelDecoder, TwoPromptDecoder
from flexalign.generation.dial_config import DialConfig
from flexalign.generation.early_exit import ExitTokens, require_marker
from flexalign.generation.first_answers import write_first_answers
from flexalign.generation.responses import Response, generate_responses
from flexalign.generation.thinking_limits import ClosingTokens
from flexalign.generation.two_prompt_config import TwoPromptConfig
from flexalign.lambdas import (
    AS_IT_IS,
    Exit,
    Fixed,
    Ladder,
    Policy,
    Route,
    Setting,
    require_forward,
    require_range,
    thinking_lambda,
    way_dial,
)
from flexalign.models.compatibility import RenamedToken, compare_tokens, renamed_tokens
from flexalign.models.hub import fetch_weights, note_weights
from flexalign.models.interpolation import compare_rows, interpolate
from flexalign.models.loading import (
    has_tokenizer,
    known_fingerprint,
    load_config,
    load_model,
    load_tokenizer,
)
from flexalign.models.pair import SIDES, ModelPair
from flexalign.models.prompted import PairRendering, PromptPair, TwoPrompts, context_of
from flexalign.models.sources import resolve, resolve_adapter
from flexalign.models.weights import fingerprint_file
from flexalign.systems.dials import load_dial, read_dial, read_scaled_lora, require_gate
from flexalign.systems.open import (
    Answer,
    Asked,
    Failure,
    Messages,
    Request,
    System,
    SystemOptions,
    refuse_ladders,
    require_two_models,
    require_two_prompts,
)


def default_device() -> str | None:
    """Return the default device of weights: a GPU if there is one; None means the CPU."""
    return "cuda" if torch.cuda.is_available() else None


class ModelText:
    """Writes the prompts of one model and reads its responses."""

    def __init__(self, tokenizer: Any, tags: ThinkingTags | None = None) -> None:
        """Use a tokenizer; the thinking tags are those of the tokenizer if not given."""
        self.tokenizer = tokenizer
        self.tags = tags or ThinkingTags.of(tokenizer)

    def prompt(self, messages: Messages) -> Prompt | TwoPrompts:
        """Return the prompt for :func:`generate_responses`; text if there is no chat template."""
        if isinstance(messages, str) or self.tokenizer.chat_template:
            return messages
        return "\n\n".join(message["content"] for message in messages)

    def render(self, messages: Messages) -> str:
        """Return the prompt as text."""
        return self._rendered(messages).text

    def opens(self, messages: Messages, setting: Setting = AS_IT_IS) -> bool:
        """Return whether the prompt leaves the thinking open: the response then begins inside it.

        Args:
            messages: The prompt.
            setting: The setting of the dial, which matters where there are two prompts.
        """
        return self._rendered(messages).opening is Opening.OPENED

    def _rendered(self, messages: Messages) -> RenderedPrompt:
        prompt = self.prompt(messages)
        if isinstance(prompt, TwoPrompts):
            return prompt.reference
        return Rendering(self.tokenizer, self.tags).prompt(prompt)

    def length(self, messages: Messages) -> int:
        """Return the prompt's length in tokens, without special tokens that a tokenizer adds."""
        return len(self.tokenizer(self.render(messages), add_special_tokens=False)["input_ids"])

    def whole(self, messages: Messages, response: str) -> str:
        """Return a response with its opening tag, even if the prompt contains the tag."""
        return self.tags.open + response if self.opens(messages) else response

    def thinking_tokens(self, response: str) -> int:
        """Return the number of tokens between the thinking tags."""
        return self.tags.count_tokens(response, self.tokenizer)

    def read(self, messages: Messages, response: Response, route: str | None = None) -> Answer:
        """Make an answer of a generated response.

        Args:
            messages: The prompt.
            response: The response.
            route: The route that was chosen before generation, if one was.
        """
        text = self.whole(messages, response.text)
        return Answer(
            text,
            response.tokens,
            self.thinking_tokens(text),
            response.rejected_tokens,
            response.truncated,
            route or response.route,
            response.confidence,
        )


class TwoPromptText(ModelText):
    """Writes both prompts of one model, and reads its responses.

    Where one prompt leaves the thinking open and the other has closed it, a whole response is read
    as a thinking and an answer if it closes the thinking, and as an answer if it does not. While it
    is written, the prompt that is nearer to λ decides.

    Attributes:
        rendering: Renders conversations under both prompts.
    """

    def __init__(self, rendering: PairRendering, tags: ThinkingTags | None = None) -> None:
        """Use a rendering; the thinking tags are those of its tokenizer if not given."""
        super().__init__(rendering.tokenizers["reference"], tags)
        self.rendering = rendering

    def prompt(self, messages: Messages) -> TwoPrompts:
        """Return both prompts for :func:`generate_responses`."""
        return self.rendering.both(messages)

    def render(self, messages: Messages) -> str:
        """Return both prompts as text, each below its name."""
        both = self.prompt(messages)
        return "\n".join(f"[{side}]\n{getattr(both, side).text}" for side in SIDES)

    def opens(self, messages: Messages, setting: Setting = AS_IT_IS) -> bool:
        """Return whether the response begins inside the thinking, at a setting of the dial."""
        return self.prompt(messages).opens_at(thinking_lambda(setting.dial))

    def length(self, messages: Messages) -> int:
        """Return the length of the longer prompt in tokens."""
        return self.prompt(messages).longest

    def whole(self, messages: Messages, response: str) -> str:
        """Return a response with its opening tag, even if the prompt contains the tag."""
        opened = self.prompt(messages).is_opened
        is_thinking = self.tags.close in response if opened is None else opened
        return self.tags.open + response if is_thinking else response


class LocalBackend:
    """A system whose weights are on this machine.

    The settings of a dial, or of two prompts, share one batch, and those of an InRa adapter or of two
    prompts one prefill. In every other system each setting has its own, as only one model of a pair
    runs at λ = 0 and at λ = 1. Weights between two models are written and loaded for one λ at a time,
    also for those of a ladder.

    Attributes:
        kind: ``model``, ``dial``, ``pair``, ``prompts`` or ``interpolate``. A scaled LoRA is a
            ``dial``.
        config: The configuration of a trained dial, or of two prompts with a calibration; None
            without.
        default: The setting that is used if none is given.
        permitted: The least and the largest λ that may be used; None for a pair or a scaled LoRA
            without a range, which takes any λ ≥ 0.
        text: Writes its prompts and reads its responses.
    """

    def __init__(
        self,
        system: System,
        settings: Sequence[Setting] = (),
        options: SystemOptions | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        """Find and check the parts of a system; no weights are loaded.

        Args:
            system: The system.
            settings: The settings that it will be used at.
            options: How it is run.
            trust_remote_code: Permit code in a checkpoint to run.

        Raises:
            ConfigError: If a part does not exist, a setting or an option does not apply to the
                system, a biased token is not in the vocabulary, the thinking is limited and has
                no tags, or a calibration is of another model or of other prompts.
            CheckpointError: If the folder of an adapter or a calibration is damaged.
            LambdaError: If a λ is outside the range that is permitted.
            PairMismatchError: If a token id of two models is of two tokens.
        """
        self._system = system
        self.kind = "dial" if system.kind == "lora" else system.kind
        self._parts, self._options = list(system.parts), options or SystemOptions()
        self._trust_remote_code = trust_remote_code
        if self.kind != "dial" and self._options.any_base:
            raise ConfigError("--any-base is about an adapter; name --adapter.")
        if self._options.by_id:
            require_two_models([system])
        if self._options.calibration is not None:
            require_two_prompts([system])
        refuse_ladders(system, settings)

        self._sources = [resolve(part) for part in self._parts[: 1 if self.kind == "dial" else 2]]
        for source in self._sources:
            note_weights(source.path)

        self.default = Setting.of(Fixed(1.0)) if self.kind in ("pair", "prompts") else AS_IT_IS
        self.permitted = self._options.lambda_range
        self.config: DialConfig | None = None
        if self.kind == "dial":
            self._adapter = _adapter_folder(self._parts[1])
            is_scaled = system.kind == "lora"
            read = read_scaled_lora if is_scaled else read_dial
            self.config = read(self._adapter)
            require_gate(self.config, self._options.gate)
            self.default = Setting.of(Fixed(self.config.default_lambda))
            if not is_scaled:
                self.permitted = self.permitted or self.config.lambda_range
        if self._options.calibration is not None:
            self.config = TwoPromptConfig.load(Path(self._options.calibration))
            self.permitted = self.permitted or self.config.lambda_range

        if self.kind != "model":
            self.require_range(settings)

        tokenizer = load_tokenizer(self._sources[0], trust_remote_code=trust_remote_code)
        self._options.logits.require_tokens(len(tokenizer))
        self._renamed = self._compare_tokens(tokenizer) if system.has_two_models else ()
        if self._options.calibration is not None:
            self._require_calibrated(tokenizer)
        if self.config is not None:
            self.config.bind(tokenizer)
        if self._options.template:
            self._bind_asked(tokenizer, self._options.template)

        tags = self.config.tags if self.config else None
        if self._options.logits.limits_thinking:
            ClosingTokens.of(tokenizer, tags)  # raises if the thinking has no end to be found
        self.text = ModelText(tokenizer, tags)
        for setting in settings:
            if isinstance(setting.dial, Exit):  # raises if there is no thinking to be closed
                require_marker(ExitTokens.of(tokenizer, tags).reader, setting.dial.marker)
        if self.kind == "prompts":
            self.text = TwoPromptText(self._prompt_rendering(tokenizer))

    def _compare_tokens(self, tokenizer: Any) -> tuple[RenamedToken, ...]:
        """Compare the tokens of two models before weights are loaded; return those read by id."""
        aligned, by_id = self._sources[1], self._options.by_id
        if not has_tokenizer(aligned):
            return ()  # an adapter has the reference's; anything else is refused where it is loaded
        other = load_tokenizer(aligned, trust_remote_code=self._trust_remote_code)
        if self.kind == "interpolate":
            problem, _ = compare_rows(tokenizer, other, by_id=by_id)
        else:
            problem = compare_tokens(tokenizer, other, by_id=by_id)
        if problem is not None:
            raise PairMismatchError(f"{' and '.join(self._parts)} do not fit: {problem}")
        return renamed_tokens(tokenizer, other) if by_id else ()

    def _prompt_rendering(self, tokenizer: Any) -> PairRendering:
        """Check both prompts against the model's template and context, and return them bound."""
        prompts = self._options.prompts
        if prompts is None or prompts == PromptPair():
            raise ConfigError(
                f"prompts:{self._parts[0]} needs two prompts; give --aligned-prompt system=TEXT or "
                "--aligned-prompt KEY=VALUE, an argument of its chat template, or --reference-prompt."
            )
        config = load_config(self._sources[0], trust_remote_code=self._trust_remote_code)
        return PairRendering(tokenizer, prompts, context=context_of(config))

    def _require_calibrated(self, tokenizer: Any) -> None:
        """Check that a calibration is of this model and these prompts; `tokenizer` is not bound."""
        options = self._options
        if isinstance(self.config, TwoPromptConfig) and options.prompts is not None:
            prompts = options.prompts.with_template(options.template or {})
            asked = TwoPromptConfig.of(self._sources[0], tokenizer, prompts)
            self.config.require_same(asked, Path(str(options.calibration)))

    @property
    def calibration(self) -> dict[str, Any] | None:
        """The calibration of the adapter or of the two prompts; None if there is none."""
        return self.config.calibration if self.config else None

    @property
    def name(self) -> str:
        """The adapter, the prompts or the pair, as named in messages."""
        if self.kind == "dial":
            return f"the adapter {self._parts[1]}"
        if self.kind == "prompts":
            return f"{self._parts[0]} under two prompts"
        return f"the pair {','.join(self._parts)}"

    def _bind_asked(self, tokenizer: Any, asked: Mapping[str, Any]) -> None:
        """Bind template arguments that are asked for, and warn where training had others."""
        trained = template_arguments(tokenizer)
        known = self.config.rendering if self.kind == "dial" and self.config else None
        is_known = bool(trained) or known is not None
        if is_known and any(trained.get(name) != value for name, value in asked.items()):
            trained_one = self._parts[1] if self.kind == "dial" else self._parts[0]
            warnings.warn(
                f"{trained_one} was trained with the template arguments {json.dumps(trained)}, "
                f"and {json.dumps(dict(asked))} are asked for; what it is asked differs from what "
                "it was trained on.",
                stacklevel=3,
            )
        PromptSettings(asked).bind(tokenizer)

    def require_range(
        self, settings: Sequence[Setting], permit: str = "start with --lambda-range LEAST,LARGEST"
    ) -> None:
        """Refuse settings that may use a λ outside the range that is permitted.

        Args:
            settings: The settings.
            permit: The advice of the message: how to permit such a λ.

        Raises:
            LambdaError: If there is one.
        """
        dials = [(setting.id, setting.dial) for setting in settings if setting.dial is not None]
        if self.permitted is None:
            require_forward(dials, permit)
        else:
            require_range(self.permitted, dials, self.name, permit)

    def require_dial(self, settings: Sequence[Setting]) -> None:
        """Refuse settings, a gate and a range for a plain model, which has no dial.

        Exit policies are for plain models too. Ladders are refused for all that is one model.

        Args:
            settings: The settings that the user gave.

        Raises:
            ConfigError: If the system is a plain model and one of them is given, or a setting is a
                ladder that the system has no weights for.
        """
        refuse_ladders(self._system, settings)
        if self.kind != "model":
            return
        asked = [setting.id for setting in settings if not isinstance(setting.dial, Exit)]
        asked += ["a gate"] * (self._options.gate is not None)
        asked += ["--lambda-range"] * (self._options.lambda_range is not None)
        if asked:
            raise ConfigError(
                f"{asked[0]} needs a dial, and the model alone has none; name its --adapter, the "
                "--aligned model beside it, or an --aligned-prompt."
            )

    def describe(self) -> dict[str, Any]:
        """Return names, fingerprints, the data type, the thinking tags, and what was read by id."""
        parts = [{"name": str(s), "fingerprint": known_fingerprint(s)} for s in self._sources]
        if self.kind == "dial" and self.config is not None:
            weights = None
            if fetch_weights(self._adapter):
                weights = fingerprint_file(self._adapter / self.config.WEIGHTS_FILE)
            parts.append({"name": self._parts[1], "fingerprint": weights})

        tags = self.text.tags
        template = str(self.text.tokenizer.chat_template)
        prompts = self._options.prompts if self.kind == "prompts" else None
        return {
            "kind": self._system.kind,
            "parts": parts,
            "dtype": self._options.dtype,
            "thinking_tags": [tags.open, tags.close],
            "template": hashlib.sha256(template.encode()).hexdigest()[:16],
            **({} if prompts is None else {"prompts": prompts.to_json()}),
            **({"renamed": [token._asdict() for token in self._renamed]} if self._renamed else {}),
        }

    def render(self, messages: Messages) -> str:
        """Return the prompt as text, as the model gets it."""
        return self.text.render(messages)

    def load(self, **loading: Any) -> Any:
        """Load the weights and return the model; not used for weights between two models.

        Args:
            **loading: As in `flexalign.models.loading.load_model`; by default on a GPU if there
                is one.

        Returns:
            A transformers model, an `InRaModel`, a `LoRADial`, a `TwoModelDecoder` or a
            `TwoPromptDecoder`.

        Raises:
            CheckpointError: If weights are missing or damaged.
            PairMismatchError: If the parts do not fit together.
            UnsupportedModelError: If a part cannot be run in this way.
        """
        loading = {
            "dtype": self._options.dtype,
            "device_map": default_device(),
            "trust_remote_code": self._trust_remote_code,
        } | loading

        if self.kind == "pair":
            by_id = self._options.by_id
            return TwoModelDecoder(ModelPair.load(*self._sources, by_id=by_id, **loading))
        if self.kind == "dial":
            any_base = self._options.any_base
            # The base is passed by its name, as the model stores it.
            return load_dial(self._parts[0], self._adapter, any_base=any_base, **loading)
        model = load_model(self._sources[0], **loading)
        if isinstance(self.text, TwoPromptText):
            decoder = TwoPromptDecoder(model, self.text.rendering)
            if isinstance(self.config, TwoPromptConfig):
                decoder.dial_config = self.config
            return decoder
        return model

    @cached_property
    def model(self) -> Any:
        """The result of :meth:`load`, loaded on first use."""
        return self.load()

    def release(self) -> None:
        """Free the weights."""
        self.__dict__.pop("model", None)

    def run(
        self, requests: Sequence[Asked], done: Collection[Hashable] = ()
    ) -> Iterator[list[tuple[Asked, Answer | Failure]]]:
        """Answer the requests that are not done, block by block.

        A block that was interrupted is generated again as a whole: floats differ between batches,
        and a resumed run must not differ from an uninterrupted one.
        """
        for group in self._groups(requests):
            asked = [request for request in requests if request.setting in group]
            dial = group[0].dial
            if isinstance(dial, Ladder):
                yield from self._run_ladder(dial, asked, done)
            else:
                yield from self._run_at(group[0], asked, done, len(group))

    def _run_at(
        self, setting: Setting, requests: Sequence[Asked], done: Collection[Hashable], settings: int
    ) -> Iterator[list[tuple[Asked, Answer | Failure]]]:
        """Answer requests by the model of one setting, which is freed at the end.

        Args:
            setting: The setting.
            requests: The requests, in which each prompt has one for each of the settings.
            done: Keys of the requests that are answered already.
            settings: Number of settings that share the model.
        """
        blocks = self._blocks(requests, settings)
        blocks = [block for block in blocks if any(one.key not in done for one in block)]
        if not blocks:
            return

        with self._model_at(setting) as model:
            for block in blocks:
                answers = self._answer(model, block, settings)
                yield [
                    (request, answer)
                    for request, answer in zip(block, answers, strict=True)
                    if request.key not in done
                ]

    def _run_ladder(
        self, ladder: Ladder, requests: Sequence[Asked], done: Collection[Hashable]
    ) -> Iterator[list[tuple[Asked, Answer | Failure]]]:
        """Answer requests at the λ that a first answer to each prompt chooses.

        The samples of a prompt share its first answer, which is greedy. A run that goes on writes all
        first answers again, because they decide which requests are in one block.
        """
        if all(request.key in done for request in requests):
            return
        samples: dict[Hashable, list[Asked]] = {}
        for request in requests:
            samples.setdefault(request.prompt, []).append(request)

        first: dict[Hashable, Response] = {}
        later: dict[float, list[Asked]] = {lam: [] for lam in ladder.lambdas[1:]}
        for answered in self._first_answers(ladder, [own[0] for own in samples.values()]):
            kept: list[tuple[Asked, Answer | Failure]] = []
            for asked, response in answered:
                ended = response.route == "fast"
                lam = ladder.next_lambda(response.confidence if ended else None)
                first[asked.prompt], own = response, samples[asked.prompt]
                if lam is None:
                    answer = self.text.read(asked.messages, response)
                    kept += [(request, answer) for request in own if request.key not in done]
                else:
                    later[lam] += own
            if kept:
                yield kept

        for lam, rejected in later.items():
            for block in self._run_at(Setting.of(lam), rejected, done, 1):
                yield [
                    (request, _after_first(first[request.prompt], answer))
                    for request, answer in block
                ]

    def _first_answers(
        self, ladder: Ladder, requests: Sequence[Asked]
    ) -> Iterator[list[tuple[Asked, Response]]]:
        """Write first answers block by block, with the model of the ladder's first λ."""
        options = self._options
        with self._model_at(Setting.of(ladder.lambdas[0])) as model:
            for block in self._blocks(requests, 1):
                responses = write_first_answers(
                    model,
                    self.text.tokenizer,
                    [self.text.prompt(request.messages) for request in block],
                    ladder.first,
                    max_new_tokens=options.max_new_tokens,
                    logits=options.logits,
                    batch_size=len(block),
                )
                yield list(zip(block, responses, strict=True))

    def _groups(self, requests: Sequence[Request]) -> list[list[Setting]]:
        """Return the settings in groups that are decoded together."""
        settings = list(dict.fromkeys(request.setting for request in requests))
        if self.kind not in ("dial", "prompts"):
            return [[setting] for setting in settings]
        alone = [[s] for s in settings if isinstance(s.dial, Policy)]
        together = [s for s in settings if not isinstance(s.dial, Policy)]
        return [together, *alone] if together else alone

    def _blocks(self, requests: Sequence[Asked], settings: int) -> list[list[Asked]]:
        """Return batches of prompts of similar length, the longest first.

        All settings of a prompt are in the same batch, side by side.
        """
        lengths = {one.prompt: self.text.length(one.messages) for one in requests}
        places = {prompt: index for index, prompt in enumerate(lengths)}

        def order(request: Request) -> tuple[int, int, int]:
            return -lengths[request.prompt], places[request.prompt], request.sample

        ordered = sorted(requests, key=order)
        size = max(1, self._options.batch_size // settings) * settings
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def _answer(self, model: Any, block: Sequence[Request], settings: int) -> list[Answer]:
        """Answer one block, in which each prompt has one row per setting."""
        options = self._options
        dials = [_resolved(request) for request in block]
        more: dict[str, Any] = {}
        if self.kind in ("dial", "pair", "prompts"):
            more = {"lam": [dial for dial, _ in dials], "gate": options.gate}
        elif self.kind == "model" and isinstance(block[0].setting.dial, Exit):
            more = {"lam": [dial for dial, _ in dials]}

        responses = generate_responses(
            _OnePrefill(model, settings) if settings > 1 else model,
            self.text.tokenizer,
            [self.text.prompt(request.messages) for request in block],
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            logits=options.logits,
            batch_size=len(block),
            seeds=[request.seed for request in block],
            **more,
        )
        return [
            self.text.read(request.messages, response, route)
            for request, response, (_, route) in zip(block, responses, dials, strict=True)
        ]

    @contextmanager
    def _model_at(self, setting: Setting) -> Iterator[Any]:
        """Yield the model of a setting; interpolated weights are made anew for each setting."""
        if self.kind != "interpolate":
            yield self.model
            return

        if setting.lam is None:
            raise ConfigError(
                f"weights are interpolated at a number or under a ladder, and {setting.id} is neither."
            )
        with TemporaryDirectory(prefix="flexalign-") as scratch:
            reference, aligned = self._sources
            folder = interpolate(
                reference,
                aligned,
                setting.lam,
                Path(scratch) / "model",
                by_id=self._options.by_id,
            )
            yield load_model(folder, dtype=self._options.dtype, device_map=default_device())


class _OnePrefill:
    """A dial whose ``generate`` is a sweep: a model of two streams then prefills each prompt once."""

    def __init__(self, model: Any, settings: int) -> None:
        self._model, self._settings = model, settings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, lam: list[Any], **options: Any
    ) -> Any:
        """Generate for prompts that have one row per setting; the rows of a prompt are equal."""
        n = self._settings
        options |= {name: options[name][::n] for name in self._model.row_inputs if name in options}
        return self._model.sweep(input_ids[::n], attention_mask[::n], lams=lam[:n], **options)


def _after_first(first: Response, answer: Answer | Failure) -> Answer | Failure:
    """Return the answer to a question whose first answer was rejected, with the tokens of both."""
    if isinstance(answer, Failure):
        return answer
    return replace(
        answer,
        tokens=answer.tokens + first.tokens,
        rejected_tokens=answer.rejected_tokens + first.tokens,
        route="slow",
        confidence=first.confidence,
    )


def _resolved(request: Request) -> tuple[Any, str | None]:
    """Return a request's dial and route; a random route depends only on the request's seed."""
    dial = request.setting.dial
    if not isinstance(dial, Route):
        return dial, None
    way = dial.draw(torch.Generator().manual_seed(request.seed))
    return way_dial(dial, way), way


def _adapter_folder(name: str) -> Path:
    path = resolve_adapter(name)
    if not path.is_dir():
        raise ConfigError(
            f"there is no adapter {name!r}: it is no folder here; give one that flexalign adapt, "
            "flexalign realign with lora, or save_pretrained wrote."
        )
    return path
