"""Policies that choose between the fast and the slow stream for a whole response.

For a batch in which each row has its own dial:

1. The prompts are prefilled once, in every stream that one of the next steps needs.
2. For rows with an adaptive policy, the fast answer is generated greedily from a copy of the cache.
3. Rows whose confidence reaches their threshold are done and leave the batch.
4. All other rows, including those without a policy, are generated from the prefilled cache with
   the caller's sampling.

:mod:`flexalign.generation.interface` declares the methods of the model that this module uses.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.utils import ModelOutput

from flexalign.errors import ConfigError
from flexalign.generation.confidence import ConfidenceTracker
from flexalign.generation.interface import DialModel
from flexalign.generation.penalties import RowPenalties
from flexalign.generation.row_lambdas import RowDials
from flexalign.generation.seeded import SeededSampling
from flexalign.generation.text import ResponseText
from flexalign.lambdas import Adaptive, Dial, Route, Way, way_dial

NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
"""Transformers' defaults. With greedy decoding, any other value causes a warning."""

_WHOLE_DISTRIBUTION = {
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
}
_GREEDY = {"do_sample": False, **NEUTRAL, **_WHOLE_DISTRIBUTION, "num_return_sequences": 1}
"""Settings of ``generate`` for one greedy response per prompt."""

_SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **_WHOLE_DISTRIBUTION}
"""Settings of ``generate`` for samples from the model's unchanged distribution."""

_REFUSED = ("past_key_values", "inputs_embeds", "output_scores", "output_logits")

_Value = TypeVar("_Value")


@dataclass
class RoutedOutput(ModelOutput):  # type: ignore[misc]
    """The output of ``generate`` with a policy that chooses a stream: one entry per returned row.

    Attributes:
        sequences: Prompts and responses, right padded, as ``generate`` returns them.
        route: ``"fast"`` or ``"slow"``; None for rows without such a policy.
        confidence: The confidence of the fast answer; None for rows without one. If generation was
            stopped because a probability fell below the threshold, its value at that token.
        rejected_tokens: Number of generated tokens that are not in the response: those of a
            rejected fast answer, and those of samples for comparison. Tokens that end a response
            are not counted.
    """

    sequences: Tensor | None = None
    route: list[Way | None] | None = None
    confidence: list[float | None] | None = None
    rejected_tokens: list[int] | None = None


def chooses_stream(dials: Sequence[Dial]) -> bool:
    """Return whether any of the dials is a policy that chooses a stream for a whole response."""
    return any(isinstance(dial, Adaptive | Route) for dial in dials)


def generate_with_policies(
    model: DialModel, dials: Sequence[Dial], gate: float | None, options: dict[str, Any]
) -> Any:
    """Generate for prompts of which some have a policy that chooses a stream.

    Args:
        model: The model.
        dials: One per prompt.
        gate: As in ``generate``.
        options: The other arguments of ``generate``.

    Returns:
        A :class:`RoutedOutput` if ``return_dict_in_generate`` is set, else its sequences.

    Raises:
        ConfigError: If an option is not available with such a policy.
    """
    _check_options(model, dials, options)
    own = {name: options.pop(name) for name in model.row_inputs if name in options}
    prompts = PromptBatch(
        model, options.pop("input_ids"), options.pop("attention_mask", None), gate, own
    )
    streamer = options.pop("streamer", None)
    repeats = model.generation_option("num_return_sequences", options) or 1
    is_whole = model.generation_option("return_dict_in_generate", options)
    options = _with_settings(options, {"return_dict_in_generate": False})

    routes: list[Way | None] = [dial.draw() if isinstance(dial, Route) else None for dial in dials]
    rest = {row: _slow_part(dial, routes[row]) for row, dial in enumerate(dials)}

    policies = {row: dial for row, dial in enumerate(dials) if isinstance(dial, Adaptive)}
    answers: dict[int, FastAnswer] = {}
    if policies:
        answers = _write_fast_answers(prompts, policies, rest, options)

    # Rows whose fast answer is accepted are done; they leave the batch.
    written: dict[int, Tensor] = {}
    for row, answer in answers.items():
        routes[row] = "slow" if answer.accepted is None else "fast"
        if answer.accepted is not None:
            written[row] = answer.accepted.expand(repeats, -1)
            del rest[row]
            if streamer is not None:
                _stream(streamer, prompts.ids, answer.accepted)

    if rest:
        if streamer is not None:
            options["streamer"] = streamer
        sequences = prompts.generate(rest, options, is_last=True)
        written |= dict(zip(rest, torch.split(sequences, repeats), strict=True))

    rows = range(len(dials))
    sequences = _joined(prompts.ids, [written[row] for row in rows], model.pad_token(options))
    if not is_whole:
        return sequences
    tried = [answers.get(row) for row in rows]
    return RoutedOutput(
        sequences=sequences,
        route=_repeat(routes, repeats),
        confidence=_repeat([one and one.confidence for one in tried], repeats),
        rejected_tokens=_repeat([one.rejected_tokens if one else 0 for one in tried], repeats),
    )


def _check_options(model: DialModel, dials: Sequence[Dial], options: dict[str, Any]) -> None:
    model.check_options(options)
    for name in _REFUSED:
        value = options.get(name)
        if value is not None and value is not False:
            raise ConfigError(
                f"{name} is not available with an adaptive or route policy, whose rows go "
                "different ways; leave it out, or give λ as a number or a schedule."
            )

    rows = len(dials) * (model.generation_option("num_return_sequences", options) or 1)
    if options.get("streamer") is not None and rows > 1:
        raise ConfigError(
            f"a streamer follows one response, and this policy was given {rows} to write; "
            "stream one prompt at a time."
        )


def _slow_part(dial: Dial, route: Way | None) -> Dial:
    """Return the dial of a row whose response is not the fast answer."""
    if isinstance(dial, Adaptive):
        return way_dial(dial, "slow")
    if isinstance(dial, Route):
        return way_dial(dial, route or "fast")
    return dial


class PromptBatch:
    """A batch of prompts that is prefilled once, for several generations of some of its rows.

    Attributes:
        model: The model.
        ids: The prompts' tokens, shape ``(B, T)``.
    """

    def __init__(
        self,
        model: DialModel,
        ids: Tensor,
        mask: Tensor | None,
        gate: float | None,
        inputs: dict[str, Tensor] | None = None,
    ) -> None:
        """Store the prompts; the model does not run yet.

        Args:
            model: The model.
            ids: The prompts' tokens, shape ``(B, T)``, left padded.
            mask: Their attention mask, shape ``(B, T)``; None: no padding.
            gate: As in ``generate``.
            inputs: The model's ``row_inputs``, each of the shape of ``ids``.
        """
        self.model = model
        self._inputs = inputs or {}
        self.ids = ids
        self._mask = torch.ones_like(ids) if mask is None else mask
        self._gate = gate
        self._cache: Any = None

    def prefill(self, phases: Sequence[dict[int, Dial]], options: dict[str, Any]) -> None:
        """Fill a cache with the streams that all phases need.

        The prompts' last tokens are left out, because ``generate`` needs at least one token that is
        not in the cache.

        Args:
            phases: For each generation the dials of its rows, by row.
            options: The caller's options of ``generate``.
        """
        has_cache = self.model.generation_option("use_cache", options) is not False
        if self.ids.shape[1] < 2 or not has_cache:
            return

        needed = [(torch.tensor(list(dials)), self._dials(dials, options)) for dials in phases]
        inputs = {name: value[:, :-1] for name, value in self._inputs.items()}
        self._cache = self.model.prefill_phases(
            self.ids[:, :-1], self._mask[:, :-1], needed, **inputs
        )

    def generate(
        self,
        dials: dict[int, Dial],
        options: dict[str, Any],
        *,
        tracker: ConfidenceTracker | None = None,
        is_last: bool = False,
    ) -> Tensor:
        """Generate for some of the rows; return their new tokens, right padded.

        Args:
            dials: The dial of each of these rows, by row.
            options: The options of ``generate``.
            tracker: Measures the confidence of answers that a policy asks for. With it, seeded
                sampling of the caller is left out.
            is_last: Release the prefilled cache, because it is not needed again.
        """
        rows, own_dials = torch.tensor(list(dials)), self._dials(dials, options)
        on_device = rows.to(self.ids.device)
        given = options | {
            "input_ids": self.ids[on_device],
            "attention_mask": self._mask[on_device],
            **{name: value[on_device] for name, value in self._inputs.items()},
        }
        if self._cache is not None:
            given["past_key_values"] = self.model.fork_cache(self._cache, rows, own_dials)
        if is_last:
            self._cache = None

        processors = [
            one.keep(rows) if isinstance(one, SeededSampling | RowPenalties) else one
            for one in options.get("logits_processor") or []
            if tracker is None or not isinstance(one, SeededSampling)
        ]
        if tracker is not None:
            processors.append(tracker.recorder)
            criteria = [*(options.get("stopping_criteria") or []), tracker]
            given["stopping_criteria"] = StoppingCriteriaList(criteria)
        given["logits_processor"] = LogitsProcessorList(processors)

        written: Tensor = self.model.generate(lam=own_dials, gate=self._gate, **given)
        return written[:, self.ids.shape[1] :]

    def _dials(self, dials: dict[int, Dial], options: dict[str, Any]) -> RowDials:
        """Return the dials of some rows, which know the λ of their first generated token."""
        own = RowDials.following(list(dials.values()))
        if own.follow_thinking:
            own.begin(self.ids[list(dials)], self.model.tag_tokens(options))
        return own


class FastAnswer(NamedTuple):
    """A fast answer and whether it is accepted.

    Attributes:
        accepted: Its tokens, shape ``(tokens,)``; None if it is rejected.
        confidence: Its confidence.
        rejected_tokens: Number of tokens generated for it that are not in the response.
    """

    accepted: Tensor | None
    confidence: float
    rejected_tokens: int


def _write_fast_answers(
    prompts: PromptBatch,
    policies: dict[int, Adaptive],
    rest: dict[int, Dial],
    options: dict[str, Any],
) -> dict[int, FastAnswer]:
    """Prefill for all phases, generate fast answers, and accept or reject them.

    Args:
        prompts: The batch.
        policies: The adaptive policies, by row.
        rest: The dial of each row whose fast answer is rejected or that has none, by row.
        options: The caller's options of ``generate``.

    Returns:
        The fast answers, by row.

    Raises:
        ConfigError: If a policy measures agreement and the tokenizer is not known.
    """
    model = prompts.model
    reader = None
    if any(policy.measure == "agreement" for policy in policies.values()):
        reader = ResponseText(model.require_tokenizer("agreement", options), model.thinking_tags)

    fast: dict[int, Dial] = {row: way_dial(dial, "fast") for row, dial in policies.items()}
    prompts.prefill([fast, rest], options)

    thresholds = [model.threshold(policy) for policy in policies.values()]
    tracker = ConfidenceTracker(list(policies.values()), thresholds, prompts.ids.device)
    tokens = prompts.generate(fast, _with_settings(options, _GREEDY), tracker=tracker)
    confidence, ended = tracker.confidence.tolist(), tracker.ended.tolist()
    length, counted = tracker.length.tolist(), tracker.counted.tolist()
    answers = {row: tokens[place, : length[place]] for place, row in enumerate(policies)}

    # An answer that a limit cut off is never accepted, so no samples are generated for it.
    agreement: dict[int, tuple[float, int]] = {}
    if reader is not None:
        whole = {row: answers[row] for place, row in enumerate(policies) if ended[place]}
        agreement = _agreement(prompts, policies, fast, whole, options, reader)

    judged = {}
    for place, (row, policy) in enumerate(policies.items()):
        score, sampled_tokens = confidence[place], 0
        if policy.measure == "agreement":
            score, sampled_tokens = agreement.get(row, (0.0, 0))
        is_accepted = ended[place] and score >= thresholds[place]
        judged[row] = FastAnswer(
            answers[row] if is_accepted else None,
            score,
            sampled_tokens if is_accepted else sampled_tokens + counted[place],
        )
    return judged


def _agreement(
    prompts: PromptBatch,
    policies: dict[int, Adaptive],
    fast: dict[int, Dial],
    answers: dict[int, Tensor],
    options: dict[str, Any],
    reader: ResponseText,
) -> dict[int, tuple[float, int]]:
    """Generate samples for answers whose policy measures agreement.

    Returns:
        For each such row, the share of samples that agree with the fast answer, and the number of
        tokens of the samples.
    """
    found = {}
    judged = {row: p for row, p in policies.items() if p.measure == "agreement" and row in answers}

    # Rows with the same number of samples are one batch.
    for samples in sorted({policy.samples for policy in judged.values()}):
        rows = [row for row, policy in judged.items() if policy.samples == samples]
        tracker = ConfidenceTracker(
            [judged[row] for row in rows for _ in range(samples)],
            [0.0] * samples * len(rows),
            prompts.ids.device,
        )
        settings = _with_settings(options, _SAMPLED | {"num_return_sequences": samples})
        tokens = prompts.generate({row: fast[row] for row in rows}, settings, tracker=tracker)
        ended, length = tracker.ended.tolist(), tracker.length.tolist()
        counted = tracker.counted.tolist()

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


def _with_settings(options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the options of ``generate`` with settings changed, in a generation config if given."""
    config = options.get("generation_config")
    if config is None:
        return options | changes

    config = copy.deepcopy(config)
    config.update(**changes)
    return {k: v for k, v in options.items() if k not in changes} | {"generation_config": config}


def _stream(streamer: Any, ids: Tensor, answer: Tensor) -> None:
    """Send an accepted answer to a streamer in the way ``generate`` does."""
    streamer.put(ids.cpu())
    for token in answer.cpu():
        streamer.put(token[None])
    streamer.end()


def _joined(ids: Tensor, written: Sequence[Tensor], pad: int) -> Tensor:
    """Append responses, per prompt ``(n, tokens)``, to their prompts, padded on the right."""
    repeats = len(written[0])
    width = max(part.shape[1] for part in written)
    responses = ids.new_full((len(written) * repeats, width), pad)
    for row, part in enumerate(written):
        responses[row * repeats : (row + 1) * repeats, : part.shape[1]] = part
    return torch.cat([ids.repeat_interleave(repeats, 0), responses], -1)


def _repeat(values: Sequence[_Value], repeats: int) -> list[_Value]:
    return [value for value in values for _ in range(repeats)]
