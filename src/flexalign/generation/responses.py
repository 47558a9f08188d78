"""Generating responses to many prompts in batches, for evaluation, sampling and training.

It works with every model that has transformers' ``generate``: a plain model, a PEFT wrapper, or a
:class:`flexalign.TwoModelDecoder`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from flexalign._modes import evaluating
from flexalign.data.logits import LogitsSettings
from flexalign.data.rendering import Prompt, Rendering, end_ids
from flexalign.errors import ConfigError, DataError, LambdaError
from flexalign.generation.adaptive import NEUTRAL
from flexalign.generation.interface import DialModel
from flexalign.generation.one_stream import OneStreamModel
from flexalign.generation.penalties import RowPenalties
from flexalign.generation.policies import chooses_stream
from flexalign.generation.row_lambdas import read_dials
from flexalign.generation.seeded import SeededSampling
from flexalign.generation.text import ResponseText
from flexalign.generation.thinking_limits import ClosingTokens
from flexalign.generation.two_prompts import padded_prompts
from flexalign.lambdas import Dial, Exit, Fixed, Way, thinking_lambda
from flexalign.models.prompted import TwoPrompts


@dataclass(frozen=True)
class Response:
    """One response to one prompt.

    Attributes:
        text: The response without special tokens; thinking tags are kept.
        token_ids: The tokens, without the one that ends the response.
        tokens: Number of tokens generated for it: those of the response and ``rejected_tokens``.
        truncated: Whether the limit on new tokens cut it off.
        route: ``"fast"`` or ``"slow"``, the stream that answers, with a policy that chooses it, else
            None. With an exit policy, ``"fast"`` means that the thinking was closed at an exit.
        confidence: The confidence of the fast answer, with an adaptive policy; that of the last trial
            answer, with an exit policy.
        rejected_tokens: Number of tokens of a rejected fast answer, or of rejected trial answers, and
            of samples for comparison.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: int
    truncated: bool
    route: Way | None = None
    confidence: float | None = None
    rejected_tokens: int = 0


@torch.no_grad()
def generate_responses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | TwoPrompts],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    logits: LogitsSettings | None = None,
    batch_size: int = 32,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **generate_kwargs: Any,
) -> list[Response]:
    """Generate one response to every prompt.

    Sampling is from the model's own distribution: the settings of a checkpoint's generation config
    (top_k, a repetition penalty) are ignored unless given here. The same seed, prompts and batch
    size give the same responses. Torch's random state is restored. With ``seeds`` a response does
    not depend on the other prompts, up to the float tolerance of batching.

    Args:
        model: A model with transformers' ``generate``.
        tokenizer: Its tokenizer.
        prompts: Texts, which are not changed, or lists of messages, for the chat template. For a
            :class:`flexalign.generation.TwoPromptDecoder`, messages rendered under both prompts.
        max_new_tokens: Tokens after which a response is cut off.
        temperature: 0 is greedy.
        top_p: Probability mass sampled from, 0 < top_p ≤ 1.
        logits: Limits on tokens and on the thinking, penalties and biases; None for none.
        batch_size: Responses generated together.
        seed: Seed of all sampling.
        seeds: One seed per prompt, instead of ``seed``; see
            :class:`flexalign.generation.seeded.SeededSampling`.
        progress: Called after each batch with (responses done, responses in all).
        **generate_kwargs: More arguments of ``generate``. ``lam`` may be a list or a tensor with
            one dial per prompt, including policies; ``policy`` is the same. A plain model takes
            exit policies, and λ = 0 in rows without one.

    Returns:
        One response per prompt, in their order.

    Raises:
        ConfigError: If a setting is out of its range, a biased token is not in the vocabulary, the
            thinking is limited and the model shows no thinking tags, or there are not as many seeds
            as prompts.
        DataError: If a prompt is empty, or is a conversation and there is no chat template.
        LambdaError: If ``lam`` has another length than the prompts.
    """
    _check(max_new_tokens, temperature, top_p, batch_size)
    if seeds is not None and len(seeds) != len(prompts):
        raise ConfigError(f"there are {len(seeds)} seeds for {len(prompts)} prompts.")
    is_seeded = seeds is not None and temperature > 0

    logits = logits or LogitsSettings()
    logits.require_tokens(len(tokenizer))
    closing = None
    if logits.limits_thinking:
        closing = ClosingTokens.of(tokenizer, getattr(model, "thinking_tags", None))

    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    dials = _read_dials(generate_kwargs, len(prompts))
    if (
        isinstance(dials, list)
        and isinstance(model, nn.Module)
        and not isinstance(model, DialModel)
    ):
        model = _with_one_stream(model, tokenizer, dials)

    if temperature > 0 and not is_seeded:
        # With seeds, the logits processor applies them.
        limits = {"top_k": logits.top_k, "min_p": logits.min_p}
        generate_kwargs = {k: value for k, value in limits.items() if value} | generate_kwargs
    settings = generation_settings(
        model,
        tokenizer,
        max_new_tokens,
        0.0 if is_seeded else temperature,  # with seeds, the logits processor samples
        top_p,
        generate_kwargs,
    )

    # The longest prompts come first, so that a lack of memory shows in the first batch.
    order = sorted(range(len(encoded)), key=lambda index: -_length(encoded[index]))
    responses: list[Response | None] = [None] * len(encoded)
    reader = _ResponseReader(tokenizer, settings)
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = _padded([encoded[i] for i in batch], settings.pad_token_id, model.device)

            # Only the dictionary has the streams that policies chose.
            settings.return_dict_in_generate = False
            if dials is not None:
                generate_kwargs["lam"] = own = _rows(dials, batch)
                settings.return_dict_in_generate = not isinstance(own, Tensor) and chooses_stream(
                    own
                )

            processors = LogitsProcessorList()
            if logits.has_penalties:
                lengths = torch.tensor([_prompt_length(encoded[i]) for i in batch])
                width = inputs["input_ids"].shape[1]
                opened = [_is_opened(encoded[i], dials, i) for i in batch]
                processors.append(RowPenalties(logits, lengths, width, closing, opened))
            if is_seeded and seeds is not None:
                own_seeds = [seeds[i] for i in batch]
                token_limits = (logits.top_k, logits.min_p)
                processors.append(SeededSampling(own_seeds, temperature, top_p, *token_limits))
            if processors:
                generate_kwargs["logits_processor"] = processors

            written = model.generate(**inputs, generation_config=settings, **generate_kwargs)
            found = reader.read_all(written, inputs["input_ids"].shape[1])
            for index, response in zip(batch, found, strict=True):
                responses[index] = response
            if progress is not None:
                progress(start + len(batch), len(order))
    return cast("list[Response]", responses)


def _check(max_new_tokens: int, temperature: float, top_p: float, batch_size: int) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be a number ≥ 0 (0 is greedy), got {temperature}.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, got {top_p}.")


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt | TwoPrompts
) -> list[int] | TwoPrompts:
    """Return the tokens that generation starts from; a prompt that is rendered already is kept.

    Raises:
        DataError: If there are none, or the prompt is a conversation that cannot be rendered.
    """
    if isinstance(prompt, TwoPrompts):
        return prompt
    ids = Rendering(tokenizer).prompt(prompt).ids
    if not ids:
        raise DataError(f"the prompt {prompt!r} is empty: there is no token to go on from.")
    return ids


def _read_dials(given: dict[str, Any], prompts: int) -> list[Dial] | Tensor | None:
    """Remove ``lam`` or ``policy`` from the options of ``generate`` and parse it.

    Returns:
        One dial for each prompt; a tensor unchanged; None if neither was given.
    """
    lam, policy = given.pop("lam", None), given.pop("policy", None)
    if lam is not None and policy is not None:
        raise ConfigError("give lam or policy, not both: they are two names of one dial.")

    lam = policy if lam is None else lam
    is_per_prompt = lam.ndim > 0 if isinstance(lam, Tensor) else isinstance(lam, list | tuple)
    if is_per_prompt and len(lam) != prompts:
        raise LambdaError(
            f"lam has {len(lam)} values for {prompts} prompts; give one, or one for each."
        )
    return lam if lam is None or isinstance(lam, Tensor) else read_dials(lam, prompts)


def _with_one_stream(
    model: Any, tokenizer: PreTrainedTokenizerBase, dials: list[Dial]
) -> "OneStreamModel":
    """Return a plain model as one with a dial that has no effect, for exit policies.

    Raises:
        ConfigError: If a dial is not an exit policy, or λ = 0 for a row without one.
    """
    for dial in dials:
        if not isinstance(dial, Exit) and dial != Fixed(0.0):
            raise ConfigError(
                f"{dial} needs a dial, and a plain model has none; of the policies it takes exit "
                "alone (λ = 0 in a row without one)."
            )
    return OneStreamModel(model, tokenizer)


def _rows(dials: list[Dial] | Tensor, batch: list[int]) -> list[Dial] | Tensor:
    """Return the dials of a batch."""
    if isinstance(dials, Tensor):
        return dials[batch] if dials.ndim > 0 else dials
    return [dials[index] for index in batch]


class _ResponseReader:
    """Reads responses from rows of generated tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig) -> None:
        self._text = ResponseText(tokenizer)
        self._ends = set(settings.eos_token_id)
        self._pad = settings.pad_token_id
        self._limit = settings.max_new_tokens

    def read_all(self, written: Any, prompt_tokens: int) -> list[Response]:
        """Read the output of ``generate``: sequences, or a :class:`RoutedOutput`."""
        if isinstance(written, Tensor):
            return [self._read(row) for row in written[:, prompt_tokens:].tolist()]

        choices = zip(written.route, written.confidence, written.rejected_tokens, strict=True)
        rows = written.sequences[:, prompt_tokens:].tolist()
        return [self._read(row, *choice) for row, choice in zip(rows, choices, strict=True)]

    def _read(
        self,
        row: list[int],
        route: Way | None = None,
        confidence: float | None = None,
        rejected_tokens: int = 0,
    ) -> Response:
        end = next((place for place, token in enumerate(row) if token in self._ends), None)
        if end is None:
            end = len(row)
            # The response was cut off by the limit or by a stop string, and padding may follow.
            while end and row[end - 1] == self._pad:
                end -= 1

        ids = row[:end]
        return Response(
            self._text.read(ids),
            tuple(ids),
            len(ids) + rejected_tokens,
            truncated=end == self._limit,
            route=route,
            confidence=confidence,
            rejected_tokens=rejected_tokens,
        )


def generation_settings(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    given: dict[str, Any],
) -> GenerationConfig:
    """Return complete sampling settings, which ignore those of the checkpoint.

    Args:
        model: The model. The end tokens of its ``generation_config`` are used, and the tokenizer's.
        tokenizer: Its tokenizer.
        max_new_tokens: Tokens after which a response is cut off.
        temperature: 0 is greedy.
        top_p: Probability mass sampled from.
        given: Options of ``generate``. Those that are settings are moved from it to the result.
    """
    ends = end_ids(tokenizer, getattr(model.generation_config, "eos_token_id", None))
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0

    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        **(sampling if temperature > 0 else {"do_sample": False, **NEUTRAL}),
    )

    # The caller's options override these settings, and must not be given to ``generate`` twice.
    for name in [name for name in given if name in settings.to_dict()]:
        setattr(settings, name, given.pop(name))
    return settings


def _length(prompt: list[int] | TwoPrompts) -> int:
    return prompt.longest if isinstance(prompt, TwoPrompts) else len(prompt)


def _prompt_length(prompt: list[int] | TwoPrompts) -> int:
    """Return the tokens of a prompt that ``generate`` continues; of two, those of the reference's."""
    return len(prompt.reference.ids if isinstance(prompt, TwoPrompts) else prompt)


def _is_opened(
    prompt: list[int] | TwoPrompts, dials: list[Dial] | Tensor | None, index: int
) -> bool | None:
    """Return whether the thinking is open at the end of two prompts; None for one prompt."""
    if not isinstance(prompt, TwoPrompts):
        return None
    dial = dials[index] if isinstance(dials, list) else None
    return prompt.opens_at(thinking_lambda(dial))


def _padded(
    prompts: list[list[int] | TwoPrompts], pad: int, device: torch.device
) -> dict[str, Tensor]:
    """Return prompts, all of one kind, as one left-padded batch for ``generate``."""
    if isinstance(prompts[0], TwoPrompts):
        return padded_prompts(cast("list[TwoPrompts]", prompts), pad, device)
    return left_padded(cast("list[list[int]]", prompts), pad, device)


def left_padded(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Return rows of tokens as one left-padded batch for ``generate``: ids and mask, (B, T)."""
    longest = max(map(len, rows))
    input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": input_ids, "attention_mask": mask.to(device)}
