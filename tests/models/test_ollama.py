"""Modelfiles: the Go template, translated to Jinja word by word, renders what the model's own does."""

import re
from typing import Any

import pytest
from jinja2 import Template
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from flexalign.models.ollama import modelfile

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief: λ.<|im_end|>\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "<<SYS>>{{ message.content }}<</SYS>>{% elif message.role == 'user' %}"
    "[INST] {{ message.content }} [/INST]{% else %}{{ message.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
CONVERSATIONS = [
    [("user", "  hi\n")],
    [("system", "Say é."), ("user", "hi")],
    [("user", "1"), ("assistant", "\n2 "), ("user", "3")],
    [("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")],
]  # fmt: skip
TO_JINJA = (
    ("{{ range .Messages }}", "{% for message in messages %}"),
    ('{{ if eq .Role "system" }}', "{% if message.role == 'system' %}"),
    ('{{ else if eq .Role "user" }}', "{% elif message.role == 'user' %}"),
    ('{{ else if eq .Role "assistant" }}', "{% elif message.role == 'assistant' %}"),
    ("{{ .Content }}", "{{ message.content }}"),
    ("{{ end }}{{ end }}", "{% endif %}{% endfor %}"),
)


def _tokenizer(template: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2}, "?"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def _parts(text: str) -> dict[str, str]:
    return dict(re.findall(r'^(TEMPLATE|SYSTEM) """(.*?)"""$', text, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    "template", [CHATML, SYSTEM + CHATML, "{{ bos_token }}" + CHATML, BRACKETS]
)
def test_the_go_template_writes_what_the_models_own_does(template: str, adds_bos: bool):
    tokenizer = _tokenizer(template)
    text = modelfile("model.gguf", tokenizer, ["</s>", "<|im_end|>"], adds_bos=adds_bos)
    lines = text.splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert lines[-2:] == ['PARAMETER stop "</s>"', 'PARAMETER stop "<|im_end|>"']

    parts = _parts(text)
    assert ("SYSTEM" in parts) is (template.startswith(SYSTEM))
    translated = parts["TEMPLATE"]
    for go, jinja in TO_JINJA:
        assert translated.count(go) == 1 + 2 * (go == "{{ .Content }}")
        translated = translated.replace(go, jinja)
    renderer = Template(translated, keep_trailing_newline=True)
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        want = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if adds_bos:  # llama.cpp puts it there
            want = want.removeprefix("<s>")
        if "SYSTEM" in parts and turns[0][0] != "system":  # as Ollama does
            messages.insert(0, {"role": "system", "content": parts["SYSTEM"]})
        assert renderer.render(messages=messages) == want


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("message.content", "message.content | trim"),
        CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
        CHATML.replace("<|im_end|>", '{{ "}}" }}'),
        CHATML.replace("<|im_end|>", "\N{ZERO WIDTH SPACE}"),
        CHATML.replace("in messages", "in messages[-1:]"),
        "{{ raise_exception('no') }}",
        {"default": CHATML, "tool": CHATML},
        None,
    ],
)
def test_a_template_that_go_would_not_follow_is_left_to_the_file(template: Any):
    thinks = isinstance(template, str) and "<think>" in template
    text = modelfile(
        "model.gguf",
        _tokenizer(template + "{# </think> #}" if thinks else template),
        ["</s>"],
        adds_bos=False,
    )
    assert text.splitlines() == [
        "FROM ./model.gguf",
        "# No TEMPLATE: the chat template inside the GGUF file is used.",
        'PARAMETER stop "</s>"',
    ]
