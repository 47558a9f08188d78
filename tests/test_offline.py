"""The suite's own ground: nothing leaves the machine, and the tiny models are what they say."""

import asyncio
import socket
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


def test_another_machine_is_out_of_reach():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        with pytest.raises(OSError, match="offline"):
            sock.connect(("192.0.2.1", 80))
        with pytest.raises(OSError, match="offline"):
            sock.connect_ex(("192.0.2.1", 80))
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        pytest.raises(OSError, match="offline"),
    ):
        sock.sendto(b"x", ("192.0.2.1", 53))


def test_names_are_not_looked_up():
    with pytest.raises(OSError, match="offline"):
        socket.create_connection(("huggingface.co", 443), timeout=1)


def test_asyncio_is_held_to_it_too():
    with pytest.raises(OSError, match="offline"):
        asyncio.run(asyncio.wait_for(asyncio.open_connection("192.0.2.1", 80), timeout=1))


def test_loopback_works():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        client.sendall(b"hello")
        served, _ = server.accept()
        with served:
            assert served.recv(5) == b"hello"


def test_tokenizer_round_trips_any_text(tiny_tokenizer: PreTrainedTokenizerFast):
    text = "1+2=3 λ≠1 \n\t čau 你好"
    assert tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"]) == text
    assert len({tiny_tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "</think>")}) == 2


def test_template_marks_what_the_assistant_said(tiny_tokenizer: PreTrainedTokenizerFast):
    chat = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]
    encoded = tiny_tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    said = [
        token
        for token, kept in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if kept
    ]
    assert tiny_tokenizer.decode(said) == "3<|im_end|>"


def test_models_depend_on_their_seed_alone(tiny_model: Callable[..., PreTrainedModel]):
    ids = torch.tensor([[6, 7, 8]])
    first, again, other = (tiny_model(seed=seed)(ids).logits for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_pair_is_close_but_not_equal(tiny_pair, tiny_tokenizer: PreTrainedTokenizerFast):
    ids = tiny_tokenizer("1+2=3", return_tensors="pt")["input_ids"]
    reference, aligned = (
        AutoModelForCausalLM.from_pretrained(path)(ids).logits.softmax(-1) for path in tiny_pair
    )
    distance = 0.5 * (reference - aligned).abs().sum(-1)
    assert 0.001 < distance.max() < 0.5
