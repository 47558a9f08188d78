"""One model under a prompt of its own, and the two prompts of one model."""

import warnings
from typing import Any

import pytest

from conftest import HYBRID_TEMPLATE
from flexalign.data.prompting import PromptSettings, parse_prompt
from flexalign.data.rendering import Opening
from flexalign.data.template_arguments import template_variables
from flexalign.errors import ConfigError, DataError
from flexalign.models.prompted import (
    PairRendering,
    PromptedModel,
    PromptPair,
    check_prompt,
    prompted_messages,
    without_system,
)

USER = {"role": "user", "content": "1+2?"}
BRIEF = "Be brief."


def test_a_side_is_a_model_or_a_model_with_a_prompt() -> None:
    assert PromptedModel.parse("base") == PromptedModel("base")
    given = {"model": "base", "system": BRIEF, "template": {"enable_thinking": False}}
    side = PromptedModel.parse(given)
    assert side == PromptedModel("base", PromptSettings({"enable_thinking": False}, BRIEF))
    assert side != PromptedModel.parse({**given, "system": "Be long."})
    assert PromptedModel.parse(side) is side
    assert side.to_json() == given
    assert PromptedModel.parse({"model": "base"}).to_json() == "base"
    assert side.text == "base (system='Be brief.', enable_thinking=False)"
    assert PromptedModel("base").text == "base"
    assert side.has_prompt
    assert not PromptedModel("base").has_prompt


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "aligned must be a model or {model, system, template}, got 3"),
        ({"model": "a", "sytem": BRIEF}, "unknown key 'sytem'; did you mean 'aligned.system'"),
        ({"system": BRIEF}, "aligned.model is missing"),
        ({"model": "a", "system": 3}, "aligned.system must be text, got 3"),
        ({"model": "a", "system": " "}, "system is empty"),
        ({"model": "a", "template": "x"}, "template must be a mapping"),
    ],
)
def test_sides_of_another_form_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptedModel.parse(given)


def test_a_prompt_is_read_from_the_command_line() -> None:
    given = parse_prompt(["system=a=b", "enable_thinking=false"], "--aligned-prompt")
    assert given == PromptSettings({"enable_thinking": False}, "a=b")
    assert parse_prompt([], "--aligned-prompt") == PromptSettings()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["short"], "--aligned-prompt 'short': write KEY=VALUE"),
        (["system="], "--aligned-prompt system= is empty"),
        (["system=a", "system=b"], "--aligned-prompt has 2 system messages"),
        (["x=["], r"--aligned-prompt 'x=\[': the value"),
    ],
)
def test_prompts_of_another_form_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_prompt(texts, "--aligned-prompt")


def test_a_system_message_joins_that_of_the_conversation() -> None:
    prompt = PromptSettings(system=BRIEF)
    own = {"role": "system", "content": "You are a pirate."}
    joined = {"role": "system", "content": f"You are a pirate.\n\n{BRIEF}"}
    assert prompted_messages(prompt, [USER]) == [{"role": "system", "content": BRIEF}, USER]
    assert prompted_messages(prompt, [own, USER]) == [joined, USER]
    assert own["content"] == "You are a pirate."
    assert prompted_messages(prompt, [joined, USER]) == [joined, USER]
    assert prompted_messages(PromptSettings(), [own, USER]) == [own, USER]
    parts = {"role": "system", "content": [{"type": "text", "text": "a"}]}
    (first, _) = prompted_messages(prompt, [parts, USER])
    assert first["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": BRIEF}]


def test_the_whole_conversation_is_rendered_under_each_prompt(
    hybrid_tokenizer: Any,
) -> None:
    prompts = PromptPair(PromptSettings(), PromptSettings({"enable_thinking": False}, BRIEF))
    before = hybrid_tokenizer.chat_template
    rendering = PairRendering(hybrid_tokenizer, prompts)
    assert hybrid_tokenizer.chat_template == before

    turns = [USER, {"role": "assistant", "content": "3"}, USER]
    both = rendering.both(turns)
    history = "user\n1+2?<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n<|im_start|>user\n1+2?"
    head, tail = "<|im_start|>", "<|im_end|>\n<|im_start|>assistant\n"
    brief = f"{head}system\n{BRIEF}<|im_end|>\n"
    assert both.reference.text == f"{head}{history}{tail}<think>\n"
    assert both.aligned.text == f"{brief}{head}{history}{tail}<think>\n\n</think>\n\n"
    assert (
        both.aligned.ids
        == hybrid_tokenizer(both.aligned.text, add_special_tokens=False)["input_ids"]
    )
    assert both.longest == len(both.aligned.ids) > len(both.reference.ids)

    openings = both.reference.opening, both.aligned.opening
    assert openings == (Opening.OPENED, Opening.CLOSED)
    assert both.is_opened is None
    same = PairRendering(hybrid_tokenizer, PromptPair(aligned=PromptSettings(system=BRIEF)))
    assert same.both([USER]).is_opened is True
    assert rendering.stop_ids == [hybrid_tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_template_argument_that_is_not_read_is_refused(hybrid_tokenizer: Any) -> None:
    assert template_variables(hybrid_tokenizer) == {"drop_system", "enable_thinking"}
    with pytest.raises(ConfigError, match=r"sets 'thinking', .* did you mean 'enable_thinking'"):
        check_prompt(hybrid_tokenizer, PromptSettings({"thinking": False}), "aligned")
    hybrid_tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"reference prompt sets 'x', .* it reads no argument"):
        check_prompt(hybrid_tokenizer, PromptSettings({"x": 1}), "reference")
    hybrid_tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="needs a chat template, and the tokenizer has none"):
        check_prompt(hybrid_tokenizer, PromptSettings(), "reference")


@pytest.mark.parametrize(
    "template",
    [
        HYBRID_TEMPLATE.replace("not drop_system", "false"),
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ messages[0].content }}{% if add_generation_prompt %}:{% endif %}",
    ],
)
def test_a_system_message_needs_a_place(hybrid_tokenizer: Any, template: str) -> None:
    hybrid_tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"aligned prompt has a system message, .* no place"):
        PairRendering(hybrid_tokenizer, PromptPair(aligned=PromptSettings(system=BRIEF)))


@pytest.mark.parametrize(
    "prompts",
    [
        PromptPair(),
        PromptPair(PromptSettings(system=BRIEF), PromptSettings(system=BRIEF)),
        PromptPair(aligned=PromptSettings({"enable_thinking": True})),  # the template's default
    ],
)
def test_prompts_that_render_alike_have_nothing_to_turn(
    hybrid_tokenizer: Any, prompts: PromptPair
) -> None:
    with pytest.warns(UserWarning, match="there is nothing to turn"):
        PairRendering(hybrid_tokenizer, prompts)


def test_prompts_that_differ_do_not_warn(hybrid_tokenizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PairRendering(hybrid_tokenizer, PromptPair(aligned=PromptSettings(system=BRIEF)))


@pytest.mark.parametrize("side", ["reference", "aligned"])
def test_a_prompt_that_fills_the_context_alone_is_refused_at_once(
    hybrid_tokenizer: Any, side: str
) -> None:
    prompts = PromptPair(**{side: PromptSettings(system="be brief ; " * 20)})
    question = [{"role": "user", "content": "1"}]
    tokens = getattr(PairRendering(hybrid_tokenizer, prompts).both(question), side).ids
    for context in (len(tokens), None):
        PairRendering(hybrid_tokenizer, prompts, context=context)
    with pytest.raises(ConfigError, match=f"the {side} prompt has {len(tokens)} tokens"):
        PairRendering(hybrid_tokenizer, prompts, context=len(tokens) - 1)


def test_plain_text_has_no_place_for_a_prompt(hybrid_tokenizer: Any) -> None:
    rendering = PairRendering(hybrid_tokenizer, PromptPair(aligned=PromptSettings(system=BRIEF)))
    with pytest.raises(DataError, match="plain text, which is the same under both prompts"):
        rendering.both("1+2=")


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [{"role": "system", "content": "Be kind."}, USER],
        [{"role": "developer", "content": "Be kind."}, USER],
        [{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}, USER],
        [{"role": "user", "content": BRIEF}],
        [{"role": "user", "content": f"Say it.\n\n{BRIEF}"}],
    ],
)
def test_a_system_message_is_put_in_once_and_taken_out_again(
    messages: list[dict[str, Any]],
) -> None:
    prompt = PromptSettings(system=BRIEF)
    told = prompted_messages(prompt, messages)
    assert told != messages
    assert prompted_messages(prompt, told) == told
    assert without_system(prompt, told) == messages
    # A conversation without it stays, also where the user writes the same words.
    assert without_system(prompt, messages) == messages
