"""Early exits are those of a loop that generates afresh at the end of every part of the thinking."""

import copy
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from contract.subjects import windowed
from families import family_model
from flexalign.data.logits import LogitsSettings
from flexalign.data.prompting import PromptSettings
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError
from flexalign.generation import TwoModelDecoder, TwoPromptDecoder
from flexalign.generation.early_exit import ExitTokens, ThinkingParts
from flexalign.generation.responses import Response, generate_responses
from flexalign.generation.text import ResponseText
from flexalign.inra import InRaModel
from flexalign.lambdas import Adaptive, Exit
from flexalign.miniature import make_questions
from flexalign.miniature.world import SYSTEM
from flexalign.models.loading import load_model, load_tokenizer
from flexalign.models.pair import ModelPair
from flexalign.models.prompted import PairRendering, PromptPair
from flexalign.systems.dials import load_dial

MESSAGES = [[{"role": "user", "content": one.text}] for one in make_questions(6, 20_000)]
SEEDS = list(range(len(MESSAGES)))
LIMIT = 160


class Subject(NamedTuple):
    """A system, and a policy of it."""

    model: Any
    tokenizer: Any
    policy: Exit
    has_dial: bool = True

    def asked(self, dials: list[Any], **options: Any) -> list[Response]:
        prompts = options.pop("prompts", MESSAGES)
        if isinstance(self.model, TwoPromptDecoder):
            prompts = [self.model.rendering.both(prompt) for prompt in prompts]
        settings = {"max_new_tokens": LIMIT, "seeds": SEEDS[: len(prompts)]} | options
        return generate_responses(self.model, self.tokenizer, prompts, lam=dials, **settings)


@cache
def subject(kind: str) -> Subject:
    tokenizer = load_tokenizer("miniature:reference")
    if kind == "model":
        reference = load_model("miniature:reference")
        return Subject(reference, tokenizer, Exit(marker=";"), has_dial=False)
    if kind == "pair":
        pair = ModelPair.load("miniature:reference", "miniature:aligned")
        return Subject(TwoModelDecoder(pair), tokenizer, Exit(marker=";", slow_lambda=0.5))
    if kind == "InRa":
        model = InRaModel.from_pretrained("miniature:reference", "miniature:fast")
        return Subject(model, tokenizer, Exit(0.97, marker=";"))
    if kind == "LoRA":
        dial = load_dial("miniature:reference", "miniature:dial")
        policy = Exit(marker=";", fast_lambda=3.0, slow_lambda=0.5)
        return Subject(dial, tokenizer, policy)
    prompts = PromptPair(aligned=PromptSettings(system=SYSTEM))
    model = TwoPromptDecoder(load_model("miniature:hybrid"), PairRendering(tokenizer, prompts))
    return Subject(model, tokenizer, Exit(marker=";"))


class Expected(NamedTuple):
    """What the loop finds."""

    token_ids: tuple[int, ...]
    route: str
    confidence: float | None
    rejected_tokens: int


@torch.no_grad()
def naive(
    model: Any,
    prompt: list[int],
    slow: tuple[int, ...],
    policy: Exit,
    reader: ResponseText,
    closing: list[int],
    ends: list[int],
    limit: int = LIMIT,
    **dialled: Any,
) -> Expected:
    """Read the whole slow response; at every marker, generate a fast answer from its beginning.

    Args:
        model: The model that answers on trial.
        prompt: The tokens of its prompt.
        slow: The response without exits.
        policy: The policy.
        reader: Decodes tokens.
        closing: The tokens that close the thinking.
        ends: The tokens that end a response.
        limit: The most tokens of a response.
        **dialled: λ, where the model takes one.
    """
    tags = reader.tags or ThinkingTags()
    confidence, rejected, begin = None, 0, 0
    for length in range(1, len(slow) + 1):
        text = reader.read(prompt + list(slow[:length]))
        if tags.open not in text or tags.close in text:
            continue
        part = text.rpartition(tags.open)[2][begin:]
        if not part.endswith(policy.marker) or not part.removesuffix(policy.marker).strip():
            continue
        begin += len(part)

        start = [*prompt, *slow[:length], *closing]
        room = min(policy.answer_tokens, limit - length - len(closing))
        if room < 1 or length == limit:
            continue
        ids = torch.tensor([start])
        settings = {"do_sample": False, "max_new_tokens": room, "eos_token_id": ends}
        answer = model.generate(ids, **settings, **dialled)[0, len(start) :].tolist()
        confidence, counted = 1.0, 0
        for place, token in enumerate(answer):
            logits = model(torch.tensor([start + answer[:place]]), **dialled).logits[0, -1]
            confidence *= float(logits.double().softmax(-1)[token])
            counted += token not in ends
            if confidence < policy.threshold:
                break
        if answer[-1] in ends and confidence >= policy.threshold:
            kept = (*slow[:length], *closing, *answer[:-1])
            return Expected(kept, "fast", confidence, rejected)
        rejected += counted
    return Expected(slow, "slow", confidence, rejected)


def require_equal(response: Response, expected: Expected) -> None:
    assert response.token_ids == expected.token_ids
    assert response.route == expected.route
    assert response.rejected_tokens == expected.rejected_tokens
    assert response.tokens == len(expected.token_ids) + expected.rejected_tokens
    if expected.confidence is None:
        assert response.confidence is None
    else:
        assert response.confidence == pytest.approx(expected.confidence, rel=1e-3)


def expected_of(one: Subject, slow: list[Response], policy: Exit, **options: Any) -> list[Expected]:
    reader = ResponseText(one.tokenizer)
    closing = one.tokenizer("</think>", add_special_tokens=False)["input_ids"]
    model, dialled = one.model, {"lam": policy.fast_lambda} if one.has_dial else {}
    messages = MESSAGES
    if isinstance(model, TwoPromptDecoder):
        # At λ = 1 it is the plain model under the aligned prompt.
        told = {"role": "system", "content": SYSTEM}
        model, dialled, messages = model.base, {}, [[told, *own] for own in MESSAGES]
    rendered = [
        one.tokenizer.apply_chat_template(own, add_generation_prompt=True, return_dict=True)
        for own in messages
    ]
    return [
        naive(
            model,
            list(prompt["input_ids"]),
            response.token_ids,
            policy,
            reader,
            closing,
            [one.tokenizer.eos_token_id],
            **options,
            **dialled,
        )
        for prompt, response in zip(rendered, slow, strict=True)
    ]


@pytest.mark.parametrize(
    "kind",
    [
        "model",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("pair", "InRa", "LoRA", "prompts")
        ),
    ],
)
def test_exits_are_those_of_the_loop(kind: str):
    """In a batch with a row without the policy, whose response stays what it is."""
    one = subject(kind)
    policy = one.policy
    if kind != "InRa":
        # Nearly all trial answers are sure here: a threshold between those of the first ones.
        at_once = one.asked([replace(policy, threshold=0)] * len(MESSAGES))
        sure = sorted(response.confidence or 0 for response in at_once)
        policy = replace(policy, threshold=(sure[3] + sure[4]) / 2)
    slow = one.asked([policy.slow_lambda] * len(MESSAGES))
    expected = expected_of(one, slow, policy)
    assert any(found.rejected_tokens for found in expected)
    assert any(found.route == "fast" for found in expected)

    dials: list[Any] = [policy] * len(MESSAGES)
    dials[2] = policy.slow_lambda
    mixed = one.asked(dials)
    for place, response in enumerate(mixed):
        if place == 2:
            assert response == slow[2]
        else:
            require_equal(response, expected[place])

    (alone,) = one.asked([policy], prompts=MESSAGES[:1])
    require_equal(alone, expected[0])


def test_a_threshold_of_1_thinks_to_the_end_and_0_exits_at_once():
    one = subject("InRa")
    slow = one.asked([0.0] * len(MESSAGES))
    never = one.asked([Exit(1, marker=";")] * len(MESSAGES))
    assert [found.token_ids for found in never] == [found.token_ids for found in slow]
    assert [found.route for found in never] == ["slow"] * len(MESSAGES)
    at_once = one.asked([Exit(0, marker=";")] * len(MESSAGES))
    assert all(found.text.count(";") == 1 for found in at_once)
    assert [found.rejected_tokens for found in at_once] == [0] * len(MESSAGES)


@pytest.mark.slow
def test_limits_cut_trials_and_responses():
    """A trial answer of two tokens and its end takes three; a response its limit."""
    one = subject("InRa")
    for answer_tokens, limit in ((2, LIMIT), (64, 24), (64, 26)):
        policy = Exit(0.9, marker=";", answer_tokens=answer_tokens)
        slow = one.asked([0.0] * len(MESSAGES), max_new_tokens=limit)
        expected = expected_of(one, slow, policy, limit=limit)
        found = one.asked([policy] * len(MESSAGES), max_new_tokens=limit)
        for response, own in zip(found, expected, strict=True):
            require_equal(response, own)
            assert len(response.token_ids) <= limit


@pytest.mark.slow
def test_penalties_hold_in_the_parts_and_in_the_trials():
    one = subject("InRa")
    logits = LogitsSettings(frequency_penalty=0.3, repetition_penalty=1.1)
    slow = one.asked([0.0] * len(MESSAGES), logits=logits)
    never = one.asked([Exit(1, marker=";")] * len(MESSAGES), logits=logits)
    assert [found.token_ids for found in never] == [found.token_ids for found in slow]
    (other,) = one.asked([0.0], prompts=MESSAGES[:1])
    assert other.token_ids != slow[0].token_ids


def test_agreement_is_a_measure_too():
    """In the reference, trial answers repeat the running sum, so that samples agree."""
    one = subject("model")
    policy = Exit(1, "agreement", marker=";", samples=3)
    found = one.asked([policy] * len(MESSAGES))
    assert [response.confidence for response in found] == [1.0] * len(MESSAGES)
    for response in found:
        thinking, _, answer = response.text.partition("</think>")
        assert thinking.split()[-2] == answer.strip()
        assert response.rejected_tokens == 3  # a token of each sample


@pytest.fixture
def streamed() -> Any:
    class Collect(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.parts: list[list[int]] = []
            self.ended = 0

        def put(self, value: Any) -> None:
            self.parts.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended += 1

    return Collect()


@pytest.mark.parametrize("threshold", [0, 0.97, 1])
def test_a_streamer_gets_the_response_alone(streamed: Any, threshold: float):
    one = subject("InRa")
    policy = Exit(threshold, marker=";")
    (response,) = one.asked([policy], prompts=MESSAGES[:1], streamer=streamed)
    prompt, *tokens = streamed.parts
    assert one.tokenizer.decode(prompt).endswith("?")
    assert all(len(part) == 1 for part in tokens)
    written = [token for (token,) in tokens if token != one.tokenizer.eos_token_id]
    assert written == list(response.token_ids)
    assert streamed.ended == 1


def test_several_responses_of_a_prompt_exit_each_in_its_way():
    one = subject("InRa")
    ids = one.tokenizer.apply_chat_template(MESSAGES[0], return_tensors="pt", return_dict=True)
    output = one.model.generate(
        **ids,
        policy=one.policy,
        num_return_sequences=8,
        max_new_tokens=LIMIT,
        do_sample=True,
        return_dict_in_generate=True,
    )
    assert len(output.sequences) == len(output.route) == 8
    assert len({tuple(row) for row in output.sequences.tolist()}) > 1
    assert set(output.route) == {"fast", "slow"}


@pytest.mark.parametrize(
    "family", ["mistral", "gemma3_text", "gpt_oss", "smollm3", "qwen3_next", "mamba"]
)
def test_caches_with_windows_and_recurrent_states(family: str, tiny_tokenizer: Any):
    """Rows of several lengths, whose prompts have opened the thinking."""
    model = family_model(
        family,
        vocab_size=len(tiny_tokenizer),
        **windowed(family),
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    prompts = ["one <think>", "the answer is six because one and two make<think> three", "1<think>"]
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "seeds": [0, 1, 2]}
    slow = generate_responses(model, tiny_tokenizer, prompts, **options)
    reader = ResponseText(tiny_tokenizer)

    # A marker that occurs, and an end that trial answers reach.
    texts = "".join(response.text for response in slow)
    letters = [letter for letter in texts if letter.isascii() and letter.isprintable()]
    marker = max(sorted(set(letters)), key=letters.count)
    closing = tiny_tokenizer("</think>", add_special_tokens=False)["input_ids"]
    ids = [tiny_tokenizer(prompt)["input_ids"] for prompt in prompts]
    start = torch.tensor([ids[0] + list(slow[0].token_ids[:9]) + closing])
    answer = model.generate(start, do_sample=False, max_new_tokens=4)[0, start.shape[1] :].tolist()
    end = next(token for token in reversed(answer) if token not in closing)
    ends = [tiny_tokenizer.eos_token_id, end]
    options |= {"eos_token_id": ends}
    slow = generate_responses(model, tiny_tokenizer, prompts, **options)
    for threshold in (0.0, 0.01):
        policy = Exit(threshold, marker=marker, answer_tokens=8)
        found = generate_responses(model, tiny_tokenizer, prompts, lam=policy, **options)
        for prompt, whole, response in zip(ids, slow, found, strict=True):
            expected = naive(
                model, prompt, whole.token_ids, policy, reader, closing, ends, limit=40
            )
            require_equal(response, expected)


class TestParts:
    @pytest.fixture
    def reader(self, tiny_tokenizer: Any) -> ResponseText:
        return ResponseText(tiny_tokenizer)

    @pytest.mark.parametrize(
        ("opened", "text", "expected"),
        [
            (False, "<think>\n\na\n\nb\n\n\n\nc</think>d\n\ne\n\n", ["a", "b"]),
            (True, "a\n\nb</think>\n\nc\n\n", ["a"]),
            (False, " \n<think>a\n\n", ["a"]),
            (False, "a\n\nb\n\n<think>c\n\n", []),
            (True, "ä\n\n€\n\n", ["ä", "€"]),
        ],
    )
    def test_a_part_ends_with_the_marker_inside_the_first_thinking(
        self,
        reader: ResponseText,
        tiny_tokenizer: Any,
        opened: bool,
        text: str,
        expected: list[str],
    ):
        parts, found, written = ThinkingParts(reader, "\n\n", opened=opened), [], []
        for token in tiny_tokenizer(text)["input_ids"]:
            written.append(token)
            if parts.put(token):
                found.append(reader.read(written).split("\n\n")[-2].removeprefix("<think>")[-1])
        assert found == expected

    def test_the_marker_is_no_piece_of_the_closing_tag(self, reader: ResponseText):
        with pytest.raises(
            ConfigError, match="marker '/' is a piece of the closing tag '</think>'"
        ):
            ThinkingParts(reader, "/", opened=True)


def test_the_thinking_is_closed_as_the_template_closes_it(tiny_tokenizer: Any):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.reasoning_content %}<think>"
        "{{ message.reasoning_content }}</think>\n\n{% endif %}{{ message.content }}{% endfor %}"
    )
    closing = ExitTokens.of(tokenizer).closing
    assert tokenizer.decode(closing) == "</think>\n\n"


def test_refusals():
    one = subject("InRa")
    inputs = one.tokenizer("1+2?", return_tensors="pt")
    ids = {"input_ids": inputs["input_ids"], "policy": Exit(marker=";"), "max_new_tokens": 4}
    refused = {
        "min_new_tokens": 2,
        "max_time": 1.0,
        "num_beams": 2,
        "past_key_values": one.model.new_cache(),
        "output_scores": True,
    }
    for name, value in refused.items():
        with pytest.raises(ConfigError, match=f"{name} is not available with an"):
            one.model.generate(**ids, **{name: value})
    with pytest.raises(ConfigError, match="an exit policy needs max_new_tokens"):
        one.model.generate(**(ids | {"max_new_tokens": None}))

    plain = subject("model").model
    without = copy.deepcopy(one.tokenizer)
    without.get_vocab = lambda: {"a": 1}
    with pytest.raises(ConfigError, match="shows tags around one; take an adaptive policy"):
        generate_responses(plain, without, ["1 + 2 ?"], max_new_tokens=3, lam=Exit())
    with pytest.raises(ConfigError, match="a plain model has none; of the policies it takes exit"):
        generate_responses(plain, one.tokenizer, ["1"], max_new_tokens=3, lam=[Adaptive()])
