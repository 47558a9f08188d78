"""Fast answers: written greedily from a prefilled batch, and accepted if they are confident enough.

A :class:`PromptBatch` is prefilled once, in every stream that one of its generations needs. The fast
answers of some of its rows are generated from a copy of the cache (:func:`write_fast_answers`); the
other generations begin from the same cache. Policies use both: :mod:`flexalign.generation.policies`.

:mod:`flexalign.generation.interface` declares the methods of the model that this module uses.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from flexalign.generation.confidence import ConfidenceTracker, RowTracker
from flexalign.generation.interface import DialModel
from flexalign.generation.penalties import RowPenalties
from flexalign.generation.row_lambdas import RowDials
from flexalign.generation.seeded import SeededSampling
from flexalign.generation.text import ResponseText
from flexalign.lambdas import Adaptive, Dial, Exit, way_dial

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


_MASKS = ("attention_mask", "aligned_mask")
"""Those of a batch's tensors that are 1 at tokens and 0 at padding; the others are tokens."""


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
        tracker: RowTracker | None = None,
        after: Sequence[int] = (),
        is_last: bool = False,
    ) -> Tensor:
        """Generate for some of the rows; return their new tokens, right padded.

        Args:
            dials: The dial of each of these rows, by row.
            options: The options of ``generate``.
            tracker: Stops rows. If it measures the confidence of answers that a policy asks for,
                seeded sampling of the caller is left out.
            after: Tokens that follow each prompt here.
            is_last: Release the prefilled cache, because it is not needed again.
        """
        rows, own_dials = torch.tensor(list(dials)), self._dials(dials, options)
        on_device = rows.to(self.ids.device)
        added = torch.tensor(after, dtype=self.ids.dtype, device=self.ids.device)
        given = options | {
            name: _appended(value[on_device], added, is_mask=name in _MASKS)
            for name, value in self._tensors.items()
        }
        if self._cache is not None:
            given["past_key_values"] = self.model.fork_cache(self._cache, rows, own_dials)
        if is_last:
            self._cache = None

        processors = [
            one.keep(rows) if isinstance(one, SeededSampling | RowPenalties) else one
            for one in options.get("logits_processor") or []
            if not (isinstance(tracker, ConfidenceTracker) and isinstance(one, SeededSampling))
        ]
        if isinstance(tracker, ConfidenceTracker):
            processors.append(tracker.recorder)
        if tracker is not None:
            criteria = [*(options.get("stopping_criteria") or []), tracker]
            given["stopping_criteria"] = StoppingCriteriaList(criteria)
        given["logits_processor"] = LogitsProcessorList(processors)

        written: Tensor = self.model.generate(lam=own_dials, gate=self._gate, **given)
        return written[:, self.ids.shape[1] + len(added) :]

    def extended(self, rows: Sequence[int], written: Sequence[Sequence[int]], pad: int) -> Self:
        """Return a batch of some rows' prompts, each followed by tokens that it has written.

        Args:
            rows: The rows; a row may be repeated.
            written: Per new row, its tokens.
            pad: The token that fills shorter rows on the left.
        """
        width = max(map(len, written))

        def extend(value: Tensor, *, is_mask: bool) -> Tensor:
            parts = []
            for row, tokens in zip(rows, written, strict=True):
                own = [1] * len(tokens) if is_mask else list(tokens)
                left = [0 if is_mask else pad] * (width - len(tokens))
                parts.append(torch.cat([value.new_tensor(left), value[row], value.new_tensor(own)]))
            return torch.stack(parts)

        more = {
            name: extend(value, is_mask=name in _MASKS) for name, value in self._tensors.items()
        }
        ids, mask = more.pop("input_ids"), more.pop("attention_mask")
        return type(self)(self.model, ids, mask, self._gate, more)

    def prompt_at(self, row: int, lam: float) -> list[int]:
        """Return a row's prompt; of two prompts, the one that is nearer to λ."""
        ids = self._inputs.get("aligned_ids", self.ids) if lam >= 0.5 else self.ids
        return [int(token) for token in ids[row]]

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self._mask, **self._inputs}

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


def write_fast_answers(
    prompts: PromptBatch,
    policies: Mapping[int, Adaptive | Exit],
    thresholds: Sequence[float],
    options: dict[str, Any],
    *,
    after: Sequence[int] = (),
    limits: Mapping[int, int] | None = None,
) -> dict[int, FastAnswer]:
    """Generate fast answers, and accept or reject them.

    Args:
        prompts: The batch, prefilled for them.
        policies: The policies, by row.
        thresholds: The least confidence that each of them accepts.
        options: The caller's options of ``generate``.
        after: Tokens that follow each prompt.
        limits: The most tokens of an answer, with the token that ends it, by row; that of the
            options if not given.

    Returns:
        The fast answers, by row.

    Raises:
        ConfigError: If a policy measures agreement and the tokenizer is not known.
    """
    model = prompts.model
    reader = None
    if any(policy.measure == "agreement" for policy in policies.values()):
        reader = ResponseText(model.require_tokenizer("agreement", options), model.thinking_tags)

    fast: dict[int, Dial] = {row: way_dial(policy, "fast") for row, policy in policies.items()}
    if limits is not None:
        options = with_settings(options, {"max_new_tokens": max(limits.values())})
    tracker = ConfidenceTracker(
        list(policies.values()),
        thresholds,
        prompts.ids.device,
        None if limits is None else [limits[row] for row in policies],
    )
    tokens = prompts.generate(fast, with_settings(options, _GREEDY), tracker=tracker, after=after)
    confidence, ended = tracker.confidence.tolist(), tracker.ended.tolist()
    length, counted = tracker.length.tolist(), tracker.counted.tolist()
    answers = {row: tokens[place, : length[place]] for place, row in enumerate(policies)}

    # An answer that a limit cut off is never accepted, so no samples are generated for it.
    agreement: dict[int, tuple[float, int]] = {}
    if reader is not None:
        whole = {row: answers[row] for place, row in enumerate(policies) if ended[place]}
        agreement = _agreement(prompts, policies, fast, whole, options, reader, after, limits)

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
    policies: Mapping[int, Adaptive | Exit],
    fast: dict[int, Dial],
    answers: dict[int, Tensor],
    options: dict[str, Any],
    reader: ResponseText,
    after: Sequence[int],
    limits: Mapping[int, int] | None,
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
            None if limits is None else [limits[row] for row in rows for _ in range(samples)],
        )
        settings = with_settings(options, _SAMPLED | {"num_return_sequences": samples})
        asked = {row: fast[row] for row in rows}
        tokens = prompts.generate(asked, settings, tracker=tracker, after=after)
        ended, length = tracker.ended.tolist(), tracker.length.tolist()
        counted = tracker.counted.tolist()

        for place, row in enumerate(rows):
            opened = reader.is_opened_by([*prompts.ids[row].tolist(), *after])
            expected = reader.answer(answers[row].tolist(), opened=opened)
            own = range(place * samples, (place + 1) * samples)
            agree = [
                ended[i]
                and reader.answer(tokens[i, : length[i]].tolist(), opened=opened) == expected
                for i in own
            ]
            found[row] = sum(agree) / samples, sum(counted[i] for i in own)
    return found


def with_settings(options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the options of ``generate`` with settings changed, in a generation config if given."""
    config = options.get("generation_config")
    if config is None:
        return options | changes

    config = copy.deepcopy(config)
    config.update(**changes)
    return {k: v for k, v in options.items() if k not in changes} | {"generation_config": config}


def _appended(value: Tensor, tokens: Tensor, *, is_mask: bool) -> Tensor:
    """Append tokens, shape ``(n,)``, to each row of a batch, or ones to each row of its mask."""
    added = torch.ones_like(tokens) if is_mask else tokens
    return torch.cat([value, added.to(value).expand(len(value), -1)], 1)
