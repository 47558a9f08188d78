"""Every chat template of the installed TRL: what is trained stands where it is asked.

Templates are found by listing TRL's folder, so a new one is tested without a change here. A
template's twin for training (``…_training.jinja``) is no template that a model is asked with.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import trl
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexalign.data import strip_thinking
from flexalign.data.rendering import Rendering, tokenize_rows
from flexalign.data.template import bind_template
from flexalign.errors import DataError
from flexalign.generation.responses import encode_prompt

TEMPLATES = sorted(
    path
    for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
    if not path.stem.endswith("_training")
)
TOKEN = re.compile(r"</?[|｜]?[A-Za-z_▁]+[|｜]?>|\[/?[A-Za-z]+\]")
QUESTION = {"role": "user", "content": "What is 2+3?"}
THINKING, ANSWER = "I add 2 and 3.", "It is 5."
STOPS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "nemotron_3_nano": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen3": "<|im_end|>",
}

FITTED_THINKING = {"glm4moe", "gptoss", "muse_glimmer", "nemotron_3_ultra", "qwen3", "qwen3_8"}
FITTED_ANSWERS = {"cohere2", "glm4moe", "gptoss", "llama3", "phi3", "qwen3", "qwen3_5_nothink"}


def make_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Bytes, and every special token that the template names; EOS is a token that none writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = sorted({*TOKEN.findall(template), "</s>", "<think>", "</think>"} - {"<s>"})
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|of-nobody|>",
        pad_token="<|pad|>",
        extra_special_tokens=named,
        chat_template=template,
    )


@pytest.fixture(params=TEMPLATES, ids=[path.stem for path in TEMPLATES])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    made = make_tokenizer(request.param.read_text(encoding="utf-8"))
    made.name_or_path = request.param.stem
    return made


def asked(tokenizer: Any, messages: list[dict[str, Any]], **arguments: Any) -> str:
    """What transformers renders where a response is asked for; images' templates want parts."""
    options = {"tokenize": False, "add_generation_prompt": True, **arguments}
    if QUESTION["content"] not in tokenizer.apply_chat_template([QUESTION], **options):
        messages = in_parts(messages)
    return str(tokenizer.apply_chat_template(messages, **options))


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def response(content: str = ANSWER, **more: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content, **more}]


def sampled(tokenizer: Any, *, thinks: bool, cut: bool = False) -> dict[str, Any]:
    """A row as `flexalign sample` writes it: tokens that a model wrote after the prompt."""
    tags = Rendering(tokenizer).tags
    opens = asked(tokenizer, [QUESTION]).rstrip().endswith(tags.open)
    text = ("" if opens else f"{tags.open}\n") + f"{THINKING}\n{tags.close}\n\n{ANSWER}"
    if cut:
        text = text[: text.index(THINKING) + 5]
    elif not thinks:
        text = ANSWER
    return {
        "prompt": [QUESTION],
        "completion": response(text),
        "response_ids": ids_of(tokenizer, text),
        "truncated": cut,
    }


def stripped(tokenizer: Any) -> dict[str, Any]:
    from datasets import Dataset

    row = sampled(tokenizer, thinks=True)
    return dict(strip_thinking(Dataset.from_list([row]), Rendering(tokenizer).tags)[0])


TWO_TURNS = [QUESTION, *response(reasoning_content="Earlier."), {**QUESTION, "content": "And 4?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
ROWS = {
    "sampled with thinking": lambda t: sampled(t, thinks=True),
    "sampled without thinking": lambda t: sampled(t, thinks=False),
    "cut off inside the thinking": lambda t: sampled(t, thinks=True, cut=True),
    "messages with thinking": lambda t: {
        "prompt": [QUESTION],
        "completion": response(f"<think>\n{THINKING}\n</think>\n\n{ANSWER}"),
    },
    "messages with reasoning": lambda t: {
        "prompt": [QUESTION],
        "completion": response(reasoning_content=THINKING),
    },
    "messages without thinking": lambda t: {"prompt": [QUESTION], "completion": response()},
    "strip_thinking": stripped,
    "two turns": lambda t: {"prompt": TWO_TURNS, "completion": response()},
    "a system message": lambda t: {"prompt": [SYSTEM, QUESTION], "completion": response()},
}


def refused_kinds(tokenizer: Any) -> set[str]:
    """What contradicts the template: a closed thinking that is to be written, an unknown role."""
    kinds: set[str] = set()
    opening = asked(tokenizer, [QUESTION]).rpartition(QUESTION["content"])[2]
    if opening.rstrip().endswith("</think>"):
        kinds |= {"messages with thinking", "messages with reasoning"}
    try:
        shown = asked(tokenizer, [SYSTEM, QUESTION])
    except TemplateError:
        shown = ""
    if SYSTEM["content"] not in shown:
        kinds.add("a system message")
    return kinds


@pytest.mark.parametrize("kind", ROWS)
def test_a_response_is_trained_where_it_is_asked_for(tokenizer: Any, kind: str) -> None:
    row = ROWS[kind](tokenizer)
    if kind in refused_kinds(tokenizer):
        with pytest.raises(DataError, match=r"\Arow 1: [^\n]+\.\Z"):
            Rendering(tokenizer).row(row)
        return
    rendered = Rendering(tokenizer).row(row)

    # Before the first trained token stands what generation starts from.
    prompt = ids_of(tokenizer, asked(tokenizer, row["prompt"]))
    first = rendered.completion_mask.index(1)
    assert rendered.input_ids[:first] == prompt == encode_prompt(tokenizer, row["prompt"])
    assert rendered.completion_mask[first:] == [1] * len(rendered.response_ids)

    # The stop token ends it, once, where it is whole.
    stop = rendered.prompt.stop_id
    assert stop != tokenizer.eos_token_id
    written = rendered.response_ids
    if kind == "cut off inside the thinking":
        assert stop not in written
    else:
        assert written.count(stop) == 1
        assert written[-1] == stop
        written = written[:-1]
    if "response_ids" in row:
        assert written == row["response_ids"]
    else:
        assert tokenizer.decode(written).count(ANSWER) == 1


@pytest.mark.parametrize("thinks", [False, True])
def test_a_fitted_response_is_what_the_template_itself_writes(thinks: bool) -> None:
    keys = ("reasoning_content", "reasoning", "thinking")
    completion = response(**(dict.fromkeys(keys, THINKING) if thinks else {}))
    checked = set()
    for path in TEMPLATES:
        tokenizer = make_tokenizer(path.read_text(encoding="utf-8"))
        prompt = asked(tokenizer, [QUESTION])
        try:
            whole = tokenizer.apply_chat_template([QUESTION, *completion], tokenize=False)
        except TemplateError:
            continue
        if not whole.startswith(prompt) or ANSWER not in whole or (THINKING in whole) != thinks:
            continue  # it drops a part, or writes an answered conversation another way than asked
        rendered = Rendering(tokenizer).row({"prompt": [QUESTION], "completion": completion})
        trained = prompt + tokenizer.decode(rendered.response_ids[:-1])
        assert whole.startswith(trained), path.stem
        assert (THINKING in trained) == thinks
        checked.add(path.stem)
    assert checked >= (FITTED_THINKING if thinks else FITTED_ANSWERS)


def test_stop_tokens_are_those_of_the_models() -> None:
    for path in TEMPLATES:
        if path.stem in STOPS:
            tokenizer = make_tokenizer(path.read_text(encoding="utf-8"))
            row = {"prompt": [QUESTION], "completion": response()}
            ids = Rendering(tokenizer).row(row).response_ids
            assert tokenizer.convert_ids_to_tokens(ids[-1]) == STOPS[path.stem], path.stem


def test_a_trainer_is_given_the_same_tokens(tokenizer: Any) -> None:
    from datasets import Dataset

    row = sampled(tokenizer, thinks=True)
    rendered = Rendering(tokenizer).row(row)
    (given,) = tokenize_rows(Dataset.from_list([row]), tokenizer)
    assert given == {
        "input_ids": rendered.input_ids,
        "completion_mask": rendered.completion_mask,
    }


@pytest.mark.parametrize("value", [True, False])
def test_bound_arguments_render_as_arguments_that_are_given(tokenizer: Any, value: bool) -> None:
    given = asked(tokenizer, [QUESTION], enable_thinking=value)
    plain = tokenizer.chat_template
    bind_template(tokenizer, {"enable_thinking": value})
    assert asked(tokenizer, [QUESTION]) == given
    other = asked(tokenizer, [QUESTION], enable_thinking=not value)
    bind_template(tokenizer)
    assert tokenizer.chat_template == plain
    assert asked(tokenizer, [QUESTION], enable_thinking=not value) == other
