"""Prompts as text: with another template, and without a second beginning-of-text token."""

import copy
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing

from flexalign.data.rendering import chat_template_of, plain_prompt

USER = {"role": "user", "content": "1+2?"}


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
