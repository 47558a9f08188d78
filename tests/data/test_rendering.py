"""Rows as token ids: prompts as they are asked, responses as they were written or are fitted."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from flexalign.data import measure_lengths, split_tokens
from flexalign.data.rendering import (
    Opening,
    Rendering,
    bind_as_sampled,
    chat_template_of,
    end_ids,
    plain_prompt,
    render_chat,
    stop_ids,
    tokenize_preferences,
    tokenize_rows,
)
from flexalign.data.template import (
    bare_template,
    bind_template,
    fixed_template,
    template_arguments,
)
from flexalign.data.traces import sampling_record
from flexalign.errors import ConfigError, DataError

USER = {"role": "user", "content": "1+2?"}
OPENING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)
"""Opens the thinking in the prompt and drops it from messages, as DeepSeek-R1's does."""


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture
def opening(tokenizer: Any) -> Any:
    tokenizer.chat_template = OPENING_TEMPLATE
    return tokenizer


def row(content: str, prompt: Any = None, **more: Any) -> dict[str, Any]:
    completion = [{"role": "assistant", "content": content}]
    return {"prompt": prompt or [USER], "completion": completion, **more}


def written(tokenizer: Any, given: dict[str, Any]) -> str:
    return str(tokenizer.decode(Rendering(tokenizer).row(given).response_ids))


def test_a_chat_template_is_the_tokenizers_a_files_or_another_models(
    tmp_path: Path, tiny_tokenizer: Any, tiny_pair: Any
) -> None:
    assert chat_template_of(tiny_tokenizer, None) == tiny_tokenizer.chat_template
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0]['content'] }} ü", encoding="utf-8")
    assert chat_template_of(tiny_tokenizer, str(file)) == "{{ messages[0]['content'] }} ü"
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    assert chat_template_of(bare, str(tiny_pair.aligned)) == tiny_tokenizer.chat_template


def test_a_plain_prompt_begins_once(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    bos = tokenizer.bos_token
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}="
    assert plain_prompt(tokenizer, [USER]) == f"{bos}1+2?="
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert plain_prompt(tokenizer, [USER]) == "1+2?="
    templated = tokenizer.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    assert tokenizer("1+2?=")["input_ids"] == templated


# Responses from elsewhere, fitted to a prompt that opens the thinking.


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>\nI add.\n</think>\n\n3", "I add.\n</think>\n\n3<|im_end|>"),
        ("<think>I add.</think>3", "I add.</think>3<|im_end|>"),
        ("I add.\n</think>\n\n3", "I add.\n</think>\n\n3<|im_end|>"),
        ("3", "\n</think>\n\n3<|im_end|>"),
        ("<think>\n\n</think>\n\n3", "\n</think>\n\n3<|im_end|>"),
        ("<think>\nI add", "I add"),
        ("3<|im_end|>", "\n</think>\n\n3<|im_end|>"),
    ],
)
def test_a_response_goes_on_from_an_opened_thinking(
    opening: Any, content: str, expected: str
) -> None:
    rendered = Rendering(opening).row(row(content))
    assert rendered.prompt.opening is Opening.OPENED
    assert rendered.prompt.text.endswith("assistant\n<think>\n")
    assert opening.decode(rendered.response_ids) == expected


def test_a_thinking_apart_from_the_content_is_the_responses(opening: Any) -> None:
    given = row("3")
    for key in ("reasoning_content", "reasoning", "thinking"):
        given["completion"] = [{"role": "assistant", "content": "3", key: "I add."}]
        assert written(opening, given) == "I add.\n</think>\n\n3<|im_end|>"


def test_text_that_was_cut_off_is_all_thinking_and_has_no_stop_token(opening: Any) -> None:
    assert written(opening, row("I add and", truncated=True)) == "I add and"
    assert written(opening, row("a</think>3 and", truncated=True)) == "a</think>3 and"


def test_a_thinking_that_the_prompt_has_closed_is_refused(opening: Any) -> None:
    bind_template(opening, {"enable_thinking": False})
    assert Rendering(opening).prompt([USER]).opening is Opening.CLOSED
    assert written(opening, row("3")) == "3<|im_end|>"
    with pytest.raises(DataError, match=r"row 1: .*set `template: \{enable_thinking: true\}`"):
        Rendering(opening).row(row("<think>a</think>3"))


def test_a_question_about_the_tags_does_not_open_the_thinking(tokenizer: Any) -> None:
    prompt = [{"role": "user", "content": "What is <think> for?"}]
    assert Rendering(tokenizer).prompt(prompt).opening is Opening.FREE


# Sampled responses: their tokens, as they are.


def test_sampled_tokens_are_trained_as_they_are(opening: Any) -> None:
    ids = [9, 4, 9, 5, 9]  # no text would be cut into these
    rendered = Rendering(opening).row(row("anything", response_ids=ids))
    assert rendered.response_ids == [*ids, opening.eos_token_id]
    cut = Rendering(opening).row(row("anything", response_ids=ids, truncated=True))
    assert cut.response_ids == ids
    assert not cut.is_whole


def test_a_stop_token_in_the_middle_is_refused(tokenizer: Any) -> None:
    message = r"row 7: the response contains the stop token '<\|im_end\|>' in its middle"
    for given in (row("3<|im_end|>4"), row("3", response_ids=[9, tokenizer.eos_token_id, 9])):
        with pytest.raises(DataError, match=message):
            Rendering(tokenizer).row(given, 7)


def test_what_a_response_was_sampled_after_is_compared(opening: Any) -> None:
    def sampled() -> dict[str, Any]:
        return row("a</think>3", response_ids=[9], rendering=json.dumps(sampling_record(opening)))

    given = sampled()
    Rendering(opening).row(given)
    bind_template(opening, {"enable_thinking": False})
    with pytest.raises(DataError, match=r"template arguments \{\}, and \{\"enable_thinking\": fal"):
        Rendering(opening).row(given)
    bind_template(opening)
    opening.chat_template += " "
    with pytest.raises(DataError, match=r"row 1: .*another chat template \(hash \"[0-9a-f]{16}\""):
        Rendering(opening).row(given)
    given = sampled()
    opening.add_tokens(["<new>"])
    with pytest.raises(DataError, match="sampled with another vocabulary"):
        Rendering(opening).row(given)


# The prompt is what inference makes of it.


def test_a_prompts_last_token_does_not_merge_into_the_response() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "?": 1, "b": 2, "?b": 3}, merges=[("?", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    rendered = Rendering(tokenizer).row({"prompt": "a?", "completion": "b"})
    assert tokenizer("a?b")["input_ids"] == [0, 3]
    assert (rendered.prompt.ids, rendered.response_ids) == ([0, 1], [2, tokenizer.eos_token_id])


def test_a_developer_becomes_system_where_the_template_would_drop_it(tokenizer: Any) -> None:
    developer = {"role": "developer", "content": "be brief"}
    assert "<|im_start|>developer\nbe brief" in Rendering(tokenizer).prompt([developer, USER]).text
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role in ('system', 'user') %}[{{ m.role }}]{{ m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    text = Rendering(tokenizer).prompt([developer, USER]).text
    assert text == "[system]be brief[user]1+2?[assistant]"
    tokenizer.chat_template = (
        "{% for m in messages if m.role == 'user' %}[user]{{ m.content }}{% endfor %}"
    )
    with pytest.raises(DataError, match="leaves a message of the role developer out"):
        Rendering(tokenizer).prompt([developer, USER])


def test_a_template_without_a_generation_prompt_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(DataError, match=r"row 1: the chat template renders no generation prompt"):
        Rendering(tokenizer).row(row("3"))
    tokenizer.chat_template = "{% for m in messages[1:] %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="it cannot render a generation prompt"):
        Rendering(tokenizer).row(row("3"))


def test_a_template_that_fails_is_told_with_the_row(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content + (1 if m.content == '1+2?' else '') }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"row 2: the chat template fails on its messages"):
        Rendering(tokenizer).row(row("3"), 2)


def test_the_stop_token_is_the_templates(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|pad|>"
    assert written(tokenizer, row("3")).endswith("3<|im_end|>")
    pad, end = tokenizer.convert_tokens_to_ids(["<|pad|>", "<|im_end|>"])
    assert stop_ids(tokenizer) == [end, pad]
    assert end_ids(tokenizer, None, 7, [pad, 8]) == [7, pad, 8, end]
    assert written(tokenizer, {"prompt": "1+2=", "completion": "3"}) == "3<|pad|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert written(tokenizer, row("3")).endswith("3<|pad|>")  # it shows none


def test_earlier_turns_are_what_the_template_shows_of_them(opening: Any) -> None:
    turns = [USER, {"role": "assistant", "content": "<think>a</think>3"}, USER]
    assert "user\n1+2?<|im_end|><|im_start|>assistant\n3<|im_end|>" in written_prompt(
        opening, turns
    )


def written_prompt(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    return Rendering(tokenizer).prompt(messages).text


# Arguments and markers that are bound to a template.


def test_bound_arguments_travel_with_the_tokenizer(opening: Any, tmp_path: Path) -> None:
    arguments = {
        "enable_thinking": False,
        "names": ["ä", "#}"],
        "more": {"a": None, "b": 1.5, "c": 'say "x"'},
    }
    bind_template(opening, arguments)
    opening.save_pretrained(tmp_path)
    loaded = type(opening).from_pretrained(tmp_path)
    assert template_arguments(loaded) == arguments
    assert bare_template(loaded) == OPENING_TEMPLATE
    assert written_prompt(loaded, [USER]).endswith("<think>\n\n</think>\n\n")
    given = render_chat(loaded, [USER], add_generation_prompt=True, enable_thinking=True)
    assert given.endswith("assistant\n<think>\n")
    bind_template(loaded, {"enable_thinking": True})
    assert template_arguments(loaded) == {"enable_thinking": True}


def test_values_reach_the_template_as_they_are(tokenizer: Any) -> None:
    tokenizer.chat_template = "\n{{ messages[0].content }}|{{ a | tojson }}|{{ b }}\n"
    expected = '\n1+2?|{"x": [1, null, "é\'\\"", true]}|{% end %}\n'
    bind_template(tokenizer, {"a": {"x": [1, None, "é'\"", True]}, "b": "{% end %}"})
    text = tokenizer.apply_chat_template([USER], tokenize=False)
    assert text.replace("\\u0027", "'") == expected.rstrip("\n") or text == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"messages": 1}, "template.messages cannot be an argument"),
        ({"a b": 1}, "template.a b cannot be an argument"),
        ({"a": float("nan")}, "a value that is not plain JSON"),
        ({"a": object()}, "a value that is not plain JSON"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    tokenizer: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bind_template(tokenizer, arguments)


def test_arguments_need_a_template_and_markers_a_vocabulary(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"marker '<nope>' is not in the vocabulary"):
        bind_template(tokenizer, thinking=("<nope>", "</think>"))
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has no chat template to take them"):
        bind_template(tokenizer, {"enable_thinking": True})


# Data sets for trainers.


def test_rows_become_token_ids_and_a_mask(opening: Any) -> None:
    rows = [row("3"), row("x", response_ids=[9], truncated=True)]
    rows[0] |= {"response_ids": None, "truncated": None}
    expected = [Rendering(opening).row(given) for given in rows]
    told = [{"input_ids": e.input_ids, "completion_mask": e.completion_mask} for e in expected]
    assert tokenize_rows(Dataset.from_list(rows), opening).to_list() == told
    streamed = IterableDataset.from_generator(lambda: iter(rows))
    assert list(tokenize_rows(streamed, opening)) == told
    other = Dataset.from_list([{"messages": [USER]}])
    assert tokenize_rows(other, opening) is other


def test_preferences_become_token_ids(opening: Any) -> None:
    chosen, rejected = row("3")["completion"], row("<think>a</think>4")["completion"]
    data = Dataset.from_list([{"prompt": [USER], "chosen": chosen, "rejected": rejected}])
    (found,) = tokenize_preferences(data, opening)
    assert opening.decode(found["prompt_ids"]).endswith("assistant\n<think>\n")
    assert opening.decode(found["chosen_ids"]) == "\n</think>\n\n3<|im_end|>"
    assert opening.decode(found["rejected_ids"]) == "a</think>4<|im_end|>"


def test_what_only_reads_traces_takes_their_arguments(opening: Any) -> None:
    plain = opening.chat_template
    rows = [{"prompt": [USER], "completion": row("3")["completion"], "rendering": None}]
    bind_as_sampled(opening, Dataset.from_list(rows))
    assert opening.chat_template == plain
    told = {**sampling_record(opening), "arguments": {"enable_thinking": False}}
    rows.append({**rows[0], "rendering": json.dumps(told)})
    bind_as_sampled(opening, Dataset.from_list(rows))
    assert template_arguments(opening) == {"enable_thinking": False}


def _chat(*responses: str) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "what is one plus two"}],
                "completion": [{"role": "assistant", "content": response}],
            }
            for response in responses
        ]
    )


def _plain(*responses: str) -> Dataset:
    return Dataset.from_list([{"prompt": "1+2=", "completion": r} for r in responses])


RESPONSES = ("3", "1+2=3 and again 1+2=3", "<think>1+2=3</think>3")


@pytest.mark.parametrize("make", [_chat, _plain])
@pytest.mark.parametrize("max_length", [None, 30, 40])
def test_counts_are_those_of_the_trainer(
    make, max_length, tiny_tokenizer, tiny_model, tmp_path
) -> None:
    dataset = make(*RESPONSES)
    shortest = measure_lengths(dataset, tiny_tokenizer, None).shortest
    cut = None if max_length is None else shortest + max_length - 30
    lengths = measure_lengths(dataset, tiny_tokenizer, cut)
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_length=cut,
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
    )
    trainer = SFTTrainer(tiny_model(), args, train_dataset=dataset, processing_class=tiny_tokenizer)
    labels = [row["labels"] for row in trainer.train_dataset]
    assert lengths.rows == 3
    assert lengths.kept == len(labels)
    assert lengths.response_tokens == sum(label != -100 for row in labels for label in row)
    assert lengths.prompt_tokens == sum(label == -100 for row in labels for label in row)


def test_truncation_is_counted(tiny_tokenizer) -> None:
    dataset = _plain(*RESPONSES)
    whole = measure_lengths(dataset, tiny_tokenizer, None)
    assert (whole.kept, whole.truncated) == (3, 0)
    cut = measure_lengths(dataset, tiny_tokenizer, whole.longest - 1)
    assert (cut.kept, cut.truncated, cut.longest) == (3, 1, whole.longest)
    assert cut.response_tokens == whole.response_tokens - 1


def test_a_prompt_that_fills_the_cut_off_leaves_nothing_to_learn(tiny_tokenizer) -> None:
    dataset = Dataset.from_list(
        [
            {"prompt": "1", "completion": "2"},
            {"prompt": "one plus two plus three", "completion": "6"},
        ]
    )
    short = measure_lengths(dataset, tiny_tokenizer, None).shortest
    lengths = measure_lengths(dataset, tiny_tokenizer, short)
    assert (lengths.kept, lengths.truncated) == (1, 0)


def test_all_rows_too_long_is_refused_with_the_numbers(tiny_tokenizer) -> None:
    dataset = _chat(*RESPONSES)
    whole = measure_lengths(dataset, tiny_tokenizer, None)
    with pytest.raises(
        DataError,
        match=rf"all 3 rows are longer than the cut-off of 5 tokens "
        rf"\(the shortest has {whole.shortest}, the longest {whole.longest}\)",
    ):
        measure_lengths(dataset, tiny_tokenizer, 5)


def test_an_empty_data_set_is_refused(tiny_tokenizer) -> None:
    with pytest.raises(DataError, match="empty"):
        measure_lengths(_plain("1").select([]), tiny_tokenizer, None)


def test_a_template_that_drops_the_thinking_leaves_it_in_the_response(tiny_tokenizer) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    )
    rows = list(split_tokens(_chat(*RESPONSES), tokenizer))
    assert [tokenizer.decode(response) for _, response in rows] == [
        f"{response}<|im_end|>" for response in RESPONSES
    ]


def test_conversations_need_a_template_that_takes_them(tiny_tokenizer) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"roles user, assistant \(roles must alternate\)"):
        measure_lengths(_chat("1"), tokenizer, None)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        measure_lengths(_chat("1"), tokenizer, None)
    assert measure_lengths(_plain("1"), tokenizer, None).rows == 1


def test_fixed_arguments_are_those_that_no_call_overrides(opening: Any) -> None:
    assert fixed_template(opening) == OPENING_TEMPLATE
    bind_template(opening, {"enable_thinking": False, "more": {"a": None, "c": 'say "x"'}})
    bound = render_chat(opening, [USER], add_generation_prompt=True)
    opening.chat_template = fixed_template(opening)
    for given in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        assert render_chat(opening, [USER], add_generation_prompt=True, **given) == bound
    opening.chat_template = {"default": OPENING_TEMPLATE, "tool": OPENING_TEMPLATE}
    bind_template(opening, {"enable_thinking": False})
    fixed = fixed_template(opening)
    assert list(fixed) == ["default", "tool"]
    assert all("is not defined" not in text.partition("{# end #}")[0] for text in fixed.values())
    opening.chat_template = None
    assert fixed_template(opening) is None
