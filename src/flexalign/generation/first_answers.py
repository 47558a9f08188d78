"""First answers of a plain model with their confidence, by which a ladder chooses λ.

They are written and measured as the fast answers of an adaptive policy are
(:mod:`flexalign.generation.adaptive`), by a model that has one stream.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from flexalign.data.rendering import Prompt
from flexalign.generation.one_stream import OneStreamModel
from flexalign.generation.policies import RoutedOutput, generate_fast_answers
from flexalign.generation.responses import Response, generate_responses
from flexalign.lambdas import Adaptive
from flexalign.models.prompted import TwoPrompts


def write_first_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | TwoPrompts],
    policy: Adaptive,
    **options: Any,
) -> list[Response]:
    """Write a greedy answer to every prompt, and measure the confidence in it.

    Args:
        model: A plain model with transformers' ``generate``.
        tokenizer: Its tokenizer.
        prompts: As in :func:`~flexalign.generation.responses.generate_responses`.
        policy: The measure of confidence, and the threshold below which an answer is not written to
            its end; its λ have no effect.
        **options: More arguments of ``generate_responses``, other than those of sampling.

    Returns:
        One response per prompt. Its route is ``"fast"`` if the answer came to its end and its
        confidence reaches the threshold. Else the route is ``"slow"``, the text is empty, and
        ``tokens`` counts what was written.

    Raises:
        ConfigError: As ``generate_responses``.
        DataError: As ``generate_responses``.
    """
    first = _FirstAnswers(OneStreamModel(model, tokenizer), policy)
    return generate_responses(first, tokenizer, prompts, temperature=0.0, **options)


class _FirstAnswers:
    """A model whose ``generate`` writes first answers alone."""

    def __init__(self, model: OneStreamModel, policy: Adaptive) -> None:
        self._model, self._policy = model, policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **options: Any) -> RoutedOutput:
        return generate_fast_answers(self._model, self._policy, options)
