"""Policies at work: one prefill, a fast answer where it is sure enough, the slow way elsewhere.

The steps, for a batch whose rows each have a dial of their own:

1. The prompts are prefilled once, in every stream that any of the steps below will need.
2. Rows with an adaptive policy write their fast answer, greedily, from a copy of the cache.
3. Those whose confidence reaches their threshold are done and leave the batch.
4. All other rows, those without such a policy among them, go on from the prefilled cache with
   the caller's sampling.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.utils import ModelOutput

from flexalign.errors import ConfigError
from flexalign.generation.confidence import Watch
from flexalign.generation.row_lambdas import RowDials
from flexalign.generation.seeded import SeededSampling
from flexalign.generation.text import ResponseText
from flexalign.lambdas import Adaptive, Dial, Fixed, Route, Way

if TYPE_CHECKING:
    from flexalign.generation.fused import FusedDecoding

# Settings of transformers' ``generate`` that take the place of a caller's.

NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
"""transformers' own defaults: any other value beside greedy decoding draws a warning."""

_WHOLE = {"min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}

GREEDY = {"do_sample": False, **NEUTRAL, **_WHOLE, "num_beams": 1, "num_return_sequences": 1}
"""One greedy response per prompt."""

SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **_WHOLE}
SAMPLED |= {"num_beams": 1}
"""Responses drawn from the model's own distribution."""


def with_settings(options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the options of ``generate`` with settings changed, wherever they stand."""
    config = options.get("generation_config")
    if config is None:
        return options | changes
    config = copy.deepcopy(config)
    config.update(**changes)
    return {k: v for k, v in options.items() if k not in changes} | {"generation_config": config}


# Fast answers: written greedily, judged, and kept or not.


class Attempt(NamedTuple):
    """A fast answer.

    Attributes:
        accepted: Its tokens, shape ``(tokens,)``; None if it was rejected.
        confidence: How sure it was.
        rejected_tokens: Tokens written for it that are not in the response.
    """

    accepted: Tensor | None
    confidence: float
    rejected_tokens: int


def attempt(
    prompts: "Prompts",
    policies: dict[int, Adaptive],
    fast: dict[int, Dial],
    rest: dict[int, Dial],
    options: dict[str, Any],
) -> dict[int, Attempt]:
    """Prefill for all that follows, let rows write their fast answers, and judge these.

    Args:
        prompts: The batch.
        policies: For each such row its policy.
        fast: For the same rows the dial of the fast answer.
        rest: For every row what it will follow if it goes on after this.
        options: What the caller gave ``generate``.

    Raises:
        ConfigError: If agreement is asked for and the tokenizer is not known.
    """
    model = prompts.model
    reader = None
    if any(policy.measure == "agreement" for policy in policies.values()):
        reader = ResponseText(model._known_tokenizer("agreement", options), model._thinking_tags())
    prompts.prefill([fast, rest], options)
    given = list(policies.values())
    thresholds = [model.threshold(policy) for policy in given]
    watch = Watch(given, thresholds, prompts.ids.device)
    tokens = prompts.generate(fast, with_settings(options, GREEDY), watch=watch)
    confidence, ended = watch.confidence.tolist(), watch.ended.tolist()
    length, counted = watch.length.tolist(), watch.counted.tolist()
    answers = {row: tokens[place, : length[place]] for place, row in enumerate(policies)}
    sampled: dict[int, tuple[float, int]] = {}
    if reader is not None:
        whole = {row: answers[row] for place, row in enumerate(policies) if ended[place]}
        sampled = _agreement(prompts, policies, fast, whole, options, reader)
    attempts = {}
    for place, (row, policy) in enumerate(policies.items()):
        sure, more = confidence[place], 0
        if policy.measure == "agreement":
            sure, more = sampled.get(row, (0.0, 0))
        is_accepted = ended[place] and sure >= thresholds[place]
        attempts[row] = Attempt(
            answers[row] if is_accepted else None,
            sure,
            more if is_accepted else more + counted[place],
        )
    return attempts


def _agreement(
    prompts: "Prompts",
    policies: dict[int, Adaptive],
    fast: dict[int, Dial],
    answers: dict[int, Tensor],
    options: dict[str, Any],
    reader: ResponseText,
) -> dict[int, tuple[float, int]]:
    """Return, for each whole answer to be judged by samples, their agreement and their tokens."""
    found = {}
    judged = {row: p for row, p in policies.items() if p.measure == "agreement" and row in answers}
    for samples in sorted({policy.samples for policy in judged.values()}):
        rows = [row for row, policy in judged.items() if policy.samples == samples]
        watch = Watch(
            [judged[row] for row in rows for _ in range(samples)],
            [0.0] * samples * len(rows),
            prompts.ids.device,
        )
        settings = with_settings(options, SAMPLED | {"num_return_sequences": samples})
        tokens = prompts.generate({row: fast[row] for row in rows}, settings, watch=watch)
        ended, length, counted = watch.ended.tolist(), watch.length.tolist(), watch.counted.tolist()
        for place, row in enumerate(rows):
            opened = reader.is_opened_by(prompts.ids[row].tolist())
            expected = reader.answer(answers[row].tolist(), opened=opened)
            own = range(place * samples, (place + 1) * samples)
            agree = [
                ended[i]
                and reader.answer(tokens[i, : length[i]].tolist(), opened=opened) == expected
                for i in own
            ]
            found[row] = sum(agree) / samples, sum(counted[i] for i in own)
    return found


_REFUSED = ("past_key_values", "inputs_embeds", "output_scores", "output_logits")

_Value = TypeVar("_Value")


@dataclass
class RoutedOutput(ModelOutput):  # type: ignore[misc]
    """What ``generate`` returns under a policy that chooses a way, one entry per returned row.

    Attributes:
        sequences: Prompts and responses, right padded, as ``generate`` returns them.
        route: ``"fast"`` or ``"slow"``; None for rows whose dial is no such policy.
        confidence: The fast answer's; None for rows that wrote none to be judged. Where one of
            the probabilities fell below the threshold it is that at the token where it did.
        rejected_tokens: Tokens written that are not in the response: a rejected fast answer's,
            and those sampled to be compared. Tokens that end a response are not counted.
    """

    sequences: Tensor | None = None
    route: list[Way | None] | None = None
    confidence: list[float | None] | None = None
    rejected_tokens: list[int] | None = None


class Prompts:
    """A batch of prompts, prefilled once, to generate from as often as it takes."""

    def __init__(
        self, model: "FusedDecoding", ids: Tensor, mask: Tensor | None, gate: float | None
    ) -> None:
        """Take prompts, shape ``(B, T)``, left padded; nothing is run."""
        self.model = model
        self.ids = ids
        self._mask = torch.ones_like(ids) if mask is None else mask
        self._gate = gate
        self._cache: Any = None

    def prefill(self, phases: Sequence[dict[int, Dial]], options: dict[str, Any]) -> None:
        """Fill a cache that holds what every phase, a dial for some of the rows, will need."""
        if self.ids.shape[1] < 2 or self.model._setting("use_cache", options) is False:
            return
        needs = [(torch.tensor(list(phase)), _read(phase)) for phase in phases]
        self._cache = self.model._prefill_for(self.ids[:, :-1], self._mask[:, :-1], needs)

    def generate(
        self,
        dials: dict[int, Dial],
        options: dict[str, Any],
        *,
        watch: Watch | None = None,
        is_last: bool = False,
    ) -> Tensor:
        """Return what some of the rows write, each by its dial: their new tokens, right padded.

        Args:
            dials: For each row its dial.
            options: For ``generate``.
            watch: What is to follow them, on answers of the policy's own: sampling by the rows'
                seeds is the caller's, and left out.
            is_last: Let the prefilled cache go, as it is not needed again.
        """
        rows = torch.tensor(list(dials))
        there = rows.to(self.ids.device)
        given = options | {"input_ids": self.ids[there], "attention_mask": self._mask[there]}
        if self._cache is not None:
            given["past_key_values"] = self.model._fork(self._cache, rows, _read(dials))
        if is_last:
            self._cache = None
        processors = [
            one.keep(rows) if isinstance(one, SeededSampling) else one
            for one in options.get("logits_processor") or []
            if watch is None or not isinstance(one, SeededSampling)
        ]
        if watch is not None:
            processors.append(watch.listener)
            criteria = [*(options.get("stopping_criteria") or []), watch]
            given["stopping_criteria"] = StoppingCriteriaList(criteria)
        given["logits_processor"] = LogitsProcessorList(processors)
        written: Tensor = self.model.generate(lam=list(dials.values()), gate=self._gate, **given)
        return written[:, self.ids.shape[1] :]


def needs_routing(dials: Sequence[Dial]) -> bool:
    """Whether any of the dials chooses a way."""
    return any(isinstance(dial, Adaptive | Route) for dial in dials)


def generate_routed(
    model: "FusedDecoding", dials: Sequence[Dial], gate: float | None, options: dict[str, Any]
) -> Any:
    """Generate for prompts of which some have a policy that chooses a way.

    Args:
        model: The model.
        dials: One per prompt.
        gate: As ``generate`` takes it.
        options: All else that ``generate`` was given.

    Returns:
        A :class:`RoutedOutput`, or its sequences unless ``return_dict_in_generate`` is set.

    Raises:
        ConfigError: If an option is not available with such a policy.
    """
    _check(model, dials, options)
    prompts = Prompts(model, options.pop("input_ids"), options.pop("attention_mask", None), gate)
    streamer = options.pop("streamer", None)
    repeats = model._setting("num_return_sequences", options) or 1
    is_whole = model._setting("return_dict_in_generate", options)
    options = with_settings(options, {"return_dict_in_generate": False})

    ways: list[Way | None] = [dial.draw() if isinstance(dial, Route) else None for dial in dials]
    rest = {
        row: _slow_part(dial, way) for row, (dial, way) in enumerate(zip(dials, ways, strict=True))
    }
    policies = {row: dial for row, dial in enumerate(dials) if isinstance(dial, Adaptive)}
    attempts: dict[int, Attempt] = {}
    if policies:
        fast: dict[int, Dial] = {row: Fixed(dial.fast_lambda) for row, dial in policies.items()}
        attempts = attempt(prompts, policies, fast, rest, options)
    written: dict[int, Tensor] = {}
    for row, tried in attempts.items():
        ways[row] = "slow" if tried.accepted is None else "fast"
        if tried.accepted is not None:
            written[row] = tried.accepted.expand(repeats, -1)
            del rest[row]
            if streamer is not None:
                _stream(streamer, prompts.ids, tried.accepted)
    if rest:
        if streamer is not None:
            options["streamer"] = streamer
        sequences = prompts.generate(rest, options, is_last=True)
        written |= dict(zip(rest, torch.split(sequences, repeats), strict=True))
    rows = range(len(dials))
    sequences = _joined(prompts.ids, [written[row] for row in rows], model._pad(options))
    if not is_whole:
        return sequences
    tries = [attempts.get(row) for row in rows]
    return RoutedOutput(
        sequences=sequences,
        route=_repeat(ways, repeats),
        confidence=_repeat([one and one.confidence for one in tries], repeats),
        rejected_tokens=_repeat([one.rejected_tokens if one else 0 for one in tries], repeats),
    )


def _check(model: "FusedDecoding", dials: Sequence[Dial], options: dict[str, Any]) -> None:
    model._check_options(options)
    for name in _REFUSED:
        value = options.get(name)
        if value is not None and value is not False:
            raise ConfigError(
                f"{name} is not available with an adaptive or route policy, whose rows go "
                "different ways; leave it out, or give λ as a number or a schedule."
            )
    rows = len(dials) * (model._setting("num_return_sequences", options) or 1)
    if options.get("streamer") is not None and rows > 1:
        raise ConfigError(
            f"a streamer follows one response, and this policy was given {rows} to write; "
            "stream one prompt at a time."
        )


def _slow_part(dial: Dial, way: Way | None) -> Dial:
    """Return what a row follows if it goes on after the fast answers."""
    if isinstance(dial, Adaptive):
        return Fixed(dial.slow_lambda)
    if isinstance(dial, Route):
        return Fixed(dial.slow_lambda if way == "slow" else dial.fast_lambda)
    return dial


def _read(dials: dict[int, Dial]) -> RowDials:
    return RowDials.of(list(dials.values()), len(dials))


def _stream(streamer: Any, ids: Tensor, answer: Tensor) -> None:
    """Hand over an accepted answer as ``generate`` would have."""
    streamer.put(ids.cpu())
    for token in answer.cpu():
        streamer.put(token[None])
    streamer.end()


def _joined(ids: Tensor, written: Sequence[Tensor], pad: int) -> Tensor:
    """Put responses behind their prompts: each of ``written`` is ``(n, tokens)``."""
    repeats = len(written[0])
    width = max(part.shape[1] for part in written)
    responses = ids.new_full((len(written) * repeats, width), pad)
    for row, part in enumerate(written):
        responses[row * repeats : (row + 1) * repeats, : part.shape[1]] = part
    return torch.cat([ids.repeat_interleave(repeats, 0), responses], -1)


def _repeat(values: Sequence[_Value], repeats: int) -> list[_Value]:
    return [value for value in values for _ in range(repeats)]
