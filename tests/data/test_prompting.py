"""Template arguments, a system message and thinking markers, as recipes and commands give them."""

import copy
from typing import Any

import pytest
from datasets import Dataset

from flexalign.data.prompting import PromptSettings, parse_template
from flexalign.data.template import bound_thinking, template_arguments
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, DataError

USER = {"role": "user", "content": "1+2?"}
BRIEF = {"role": "system", "content": "Be brief."}


def prompts(*given: Any, **more: Any) -> Dataset:
    return Dataset.from_list([{"prompt": prompt, **more} for prompt in given])


def test_keys_of_a_recipe_are_read() -> None:
    given = {"open": "<think>", "close": "</think>"}
    settings = PromptSettings.parse({"enable_thinking": False}, "Be brief.", given)
    expected = ({"enable_thinking": False}, "Be brief.", ("<think>", "</think>"))
    assert (settings.template, settings.system, settings.thinking) == expected
    assert PromptSettings.parse(thinking=["a", "b"]).thinking == ("a", "b")
    reversed_keys = {"close": "</think>", "open": "<think>"}
    assert PromptSettings.parse(thinking=reversed_keys).thinking == ("<think>", "</think>")
    assert PromptSettings.parse() == PromptSettings()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"template": "think"}, "template must be a mapping such as"),
        ({"system": "  "}, "system is empty"),
        ({"thinking": "<think>"}, "thinking must be {open: TEXT, close: TEXT}"),
        ({"thinking": {"open": "a"}}, "thinking must be {open: TEXT, close: TEXT}"),
        ({"thinking": {"open": "a", "close": "a"}}, "two different markers"),
        ({"thinking": {"open": "a", "close": 3}}, "two different markers"),
    ],
)
def test_keys_of_another_form_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptSettings.parse(**keys)


def test_what_is_bound_is_what_the_tokenizer_shows(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    PromptSettings.parse().bind(tokenizer)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    tokenizer.chat_template += "{% if a or b %}{% endif %}"  # a template that reads the two
    PromptSettings.parse({"a": 1}, thinking=("<|bos|>", "<|pad|>")).bind(tokenizer)
    assert template_arguments(tokenizer) == {"a": 1}
    assert bound_thinking(tokenizer) == ("<|bos|>", "<|pad|>")
    assert ThinkingTags.of(tokenizer) == ThinkingTags("<|bos|>", "<|pad|>")

    # What is bound stays in force where it is not named.
    PromptSettings.parse({"b": 2}).bind(tokenizer)
    assert template_arguments(tokenizer) == {"a": 1, "b": 2}
    assert bound_thinking(tokenizer) == ("<|bos|>", "<|pad|>")
    PromptSettings.parse({"a": 3}).bind(tokenizer)
    assert template_arguments(tokenizer) == {"a": 3, "b": 2}


def test_an_argument_that_the_template_does_not_read_is_named(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template += "{% if enable_thinking %}{% endif %}"
    PromptSettings.parse({"enable_thinking": True}).bind(tokenizer)
    with pytest.raises(ConfigError, match=r"'enable_thinkin'.*did you mean 'enable_thinking'"):
        PromptSettings.parse({"enable_thinkin": True}).bind(tokenizer)


def test_a_system_message_stands_before_conversations_without_one() -> None:
    settings = PromptSettings(system="Be brief.")
    data = prompts([USER], [BRIEF, USER])
    assert settings.apply(data)["prompt"] == [[BRIEF, USER]] * 2
    assert PromptSettings().apply(data) is data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (prompts("1+2="), "row 1: the prompt is plain text"),
        (prompts([{**BRIEF, "content": "Be long."}, USER]), "a system message of its own, 'Be lon"),
        (prompts([USER], response_ids=[1]), "sampled without the system message"),
    ],
)
def test_a_system_message_that_contradicts_the_rows_is_refused(data: Dataset, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PromptSettings(system="Be brief.").apply(data)


def test_arguments_are_read_from_a_command_line() -> None:
    given = ["enable_thinking=false", "effort=low", "n=3", "names=[a, b]"]
    expected = {"enable_thinking": False, "effort": "low", "n": 3, "names": ["a", "b"]}
    assert parse_template(given) == expected
    for text in ("enable_thinking", "=1"):
        with pytest.raises(ConfigError, match="write KEY=VALUE"):
            parse_template([text])
    with pytest.raises(ConfigError, match="is not YAML"):
        parse_template(["a=[1"])
