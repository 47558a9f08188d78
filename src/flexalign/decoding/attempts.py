"""Fast answers: written greedily, judged, and kept or not."""

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from flexalign.decoding.confidence import Watch
from flexalign.decoding.settings import GREEDY, SAMPLED, with_settings
from flexalign.decoding.text import ResponseText
from flexalign.policies import Adaptive, Dial

if TYPE_CHECKING:
    from flexalign.decoding.routing import Prompts

__all__ = ["Attempt", "attempt"]


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
