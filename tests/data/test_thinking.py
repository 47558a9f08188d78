import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from flexalign.data.thinking import Split, ThinkingTags, strip_thinking
from flexalign.errors import ConfigError, DataError

TAGS = ThinkingTags()
plain = st.text(alphabet="ab 1\n+=", max_size=20)


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>one</think>two", False, Split("one", "two", True)),
        ("\n <think>one</think>\n\ntwo", False, Split("one", "\n\ntwo", True)),
        ("one</think>two", False, Split("one", "two", True)),
        ("one</think>two", True, Split("one", "two", True)),
        ("<think>one", False, Split("one", "", False)),
        ("one", True, Split("one", "", False)),
        ("one", False, Split("", "one", True)),
        ("say <think> aloud", False, Split("", "say <think> aloud", True)),
        ("<think></think>two", False, Split("", "two", True)),
        ("a</think>b</think>c", False, Split("a", "b</think>c", True)),
        ("", False, Split("", "", True)),
        ("", True, Split("", "", False)),
    ],
)
def test_split(text: str, opened: bool, expected: Split) -> None:
    assert TAGS.split(text, opened=opened) == expected


@given(plain, plain)
def test_split_undoes_joining(thinking: str, answer: str) -> None:
    assert TAGS.split(f"<think>{thinking}</think>{answer}") == (thinking, answer, True)
    assert TAGS.split(answer).answer == answer


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("user: hi\nassistant: <think>\n", True),
        ("user: hi\nassistant: <think>\n\n</think>\n", False),
        ("assistant: <think>a</think>b\nuser: hi", False),
        ("assistant: <think>a</think>b\nuser: hi <think>", True),
        ("user: hi", False),
    ],
)
def test_prompts_that_open_the_tag_are_known(prompt: str, opened: bool) -> None:
    assert TAGS.opened_by(prompt) is opened


def test_thinking_tokens_are_those_between_the_tags(tiny_tokenizer) -> None:
    thinking = "1+2=3 3+3=6 again"
    expected = len(tiny_tokenizer(thinking)["input_ids"])
    for text, opened in [
        (f"<think>{thinking}</think>6", False),
        (f"{thinking}</think>6", True),
        (f"<think>{thinking}", False),
    ]:
        assert TAGS.count_tokens(text, tiny_tokenizer, opened=opened) == expected
    assert TAGS.count_tokens("6", tiny_tokenizer) == 0


def test_tags_are_found_in_vocabulary_or_template(tiny_tokenizer) -> None:
    import copy

    assert ThinkingTags.detect(tiny_tokenizer) == TAGS
    other = copy.deepcopy(tiny_tokenizer)
    backend = other.backend_tokenizer.to_str().replace("think>", "thunk>")
    other = type(other)(tokenizer_object=type(other.backend_tokenizer).from_str(backend))
    assert ThinkingTags.detect(other) is None
    other.chat_template = "{{ messages[0].content.split('[/THINK]')[-1] }}"
    assert ThinkingTags.detect(other) == ThinkingTags("[THINK]", "[/THINK]")


def test_tags_must_differ() -> None:
    for pair in [("", "</think>"), ("##", "##")]:
        with pytest.raises(ConfigError, match="two different texts"):
            ThinkingTags(*pair)


def _dataset(*completions: object) -> Dataset:
    return Dataset.from_list([{"prompt": "q", "completion": c} for c in completions])


def test_stripping_keeps_answers_and_leaves_out_what_has_none() -> None:
    data = _dataset("<think>a</think>\n\n1", "2", "<think>cut off", "a</think>", "b</think> 3")
    assert strip_thinking(data)["completion"] == ["1", "2", "3"]


def test_stripping_a_conversation_removes_both_kinds_of_thinking() -> None:
    data = _dataset(
        [{"role": "assistant", "content": "<think>a</think>1", "reasoning_content": None}],
        [{"role": "assistant", "content": "2</think>2", "reasoning_content": "apart"}],
    )
    stripped = [completion[0] for completion in strip_thinking(data)["completion"]]
    assert [message["content"] for message in stripped] == ["1", "2"]
    assert not any(message.get("reasoning_content") for message in stripped)


def test_stripping_data_without_thinking_is_refused() -> None:
    with pytest.raises(DataError, match=r"no response of the 2 has the thinking tag '</think>'"):
        strip_thinking(_dataset("1", "2"))
    with pytest.raises(DataError, match="no response of the 1 has text after"):
        strip_thinking(_dataset("<think>a</think> "))
    tags = ThinkingTags("[T]", "[/T]")
    assert strip_thinking(_dataset("[T]a[/T]1"), tags)["completion"] == ["1"]


CHANNELS = ThinkingTags(
    "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{CHANNELS.open}one{CHANNELS.close}two", Split("one", "two", True)),
        (f"{CHANNELS.open}one", Split("one", "", False)),
        ("<|channel|>final<|message|>two", Split("", "two", True)),
    ],
)
def test_channels_are_tags_of_several_tokens(text: str, expected: Split) -> None:
    assert CHANNELS.answer == "<|channel|>final<|message|>"
    assert CHANNELS.split(text) == expected
    assert TAGS.answer == ""


def test_stripping_takes_thinking_that_stands_apart_or_has_other_tags() -> None:
    apart = [{"role": "assistant", "content": "1", "reasoning_content": "a"}]
    ((left,),) = strip_thinking(_dataset(apart), CHANNELS)["completion"]
    assert (left["content"], left["reasoning_content"]) == ("1", None)
    data = _dataset("<think>a</think>1", f"{CHANNELS.open}a{CHANNELS.close}2")
    assert strip_thinking(data, CHANNELS)["completion"] == ["1", "2"]


def test_stripping_leaves_out_what_was_cut_off_inside_an_opened_thinking() -> None:
    rows = [
        {"prompt": "q", "completion": "a</think>1", "response_ids": [1, 2], "truncated": None},
        {"prompt": "q", "completion": "a and a", "response_ids": [1], "truncated": True},
    ]
    stripped = strip_thinking(Dataset.from_list(rows))
    assert stripped.to_list() == [{"prompt": "q", "completion": "1", "truncated": None}]
