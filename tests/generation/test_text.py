"""What of a response counts when two answers are compared."""

from flexalign.generation.text import ResponseText


def test_special_tokens_go_and_thinking_tags_stay(tiny_tokenizer):
    reader = ResponseText(tiny_tokenizer)
    ids = tiny_tokenizer("<think>one<|im_start|> two</think> Six  is<|im_end|>")["input_ids"]
    assert reader.read(ids) == "<think>one two</think> Six  is"
    assert reader.answer(ids) == "six is"
    assert reader.answer(tiny_tokenizer("SIX \n is")["input_ids"]) == "six is"
    assert reader.answer(tiny_tokenizer("one two")["input_ids"], opened=True) == ""
    assert reader.is_opened_by(tiny_tokenizer("one<think> two")["input_ids"])
    assert not reader.is_opened_by(ids)
