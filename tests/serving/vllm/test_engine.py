"""The plugin in vLLM: mixed λ in one batch, against equation 5 over two whole models."""

import random
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.full

LAMBDAS = (0.0, 0.5, 1.0, 2.0, -0.5)
LINEAR = {"kind": "linear", "start": -0.5, "end": 1.5, "steps": 8}
JUMP = '{"kind": "piecewise", "points": [[0, 1.0], [4, 1.0], [4, 0.0]]}'
THINKING = {"kind": "thinking", "think": 0.2, "answer": 1.0, "budget": 9, "end": 2.0}
TOLERANCE = 2e-4


def _prompts(dialled, lengths, seed=0):
    draw = random.Random(seed)
    size = dialled.model.config.vocab_size
    return [[draw.randrange(6, size) for _ in range(length)] for length in lengths]


def _request(prompt, dial=None, **sampling) -> dict[str, Any]:
    extra = {} if dial is None else {"extra_args": {"lambda": dial}}
    return {"prompt": prompt, "max_tokens": 12, "ignore_eos": True, **extra, **sampling}


def _mixed(prompts, **sampling):
    dials = [*LAMBDAS, LINEAR, JUMP, THINKING, None]
    return [_request(p, dials[i % len(dials)], **sampling) for i, p in enumerate(prompts)]


def _wrong(dialled, requests, answer) -> list[str]:
    """Name each request whose tokens are not the likeliest, or log-probabilities not equation 5's."""
    assert "error" not in answer, answer["error"]
    assert len(answer["outputs"]) == len(requests)
    wrong = []
    for request, output in zip(requests, answer["outputs"], strict=True):
        prompt = request["prompt"]
        dial = request.get("extra_args", {}).get("lambda", 0.0)
        for sample in output["samples"]:
            tokens = (prompt + sample["tokens"])[:-1]
            lams = dialled.lambdas(dial, tokens, len(prompt))
            logprobs = dialled.logits(tokens, lams).log_softmax(-1)
            following = torch.tensor(tokens[1:] + sample["tokens"][-1:])
            chosen = logprobs.gather(-1, following[:, None])[:, 0]
            found = output["prompt_logprobs"] + sample["logprobs"]
            expected = chosen[len(chosen) - len(found) :]
            greedy = "temperature" not in request
            regret = greedy * (logprobs.amax(-1) - chosen)[len(prompt) - 1 :].max()
            error = (expected - torch.tensor(found)).abs().max()
            if max(regret, error) > TOLERANCE or len(sample["tokens"]) != request["max_tokens"]:
                wrong.append(f"{dial}: regret {regret:.1e}, error {error:.1e}")
    return wrong


@pytest.fixture(scope="module")
def llama(dialled):
    return dialled("llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def chunked(engine, llama):
    """Prompts longer than 48 tokens come in chunks, 32 tokens are a block of the prefix cache."""
    return engine(llama.folder, max_num_batched_tokens=48)


def test_mixed_lambda_in_one_batch(llama, chunked):
    requests = _mixed(_prompts(llama, [3, 40, 7, 90, 12, 33, 64, 5, 20, 100, 31, 32] * 2))
    assert _wrong(llama, requests, chunked(*requests)) == []


def test_a_cached_prefix_serves_every_lambda(llama, chunked):
    [prompt] = _prompts(llama, [70], seed=1)
    first = [_request(prompt, 1.0)]
    assert _wrong(llama, first, chunked(*first)) == []
    [tail] = _prompts(llama, [9], seed=2)
    requests = [_request(prompt + tail, dial) for dial in (*LAMBDAS, LINEAR, THINKING)]
    answer = chunked(*requests)
    assert [output["cached"] for output in answer["outputs"]] == [64] * len(requests)
    assert _wrong(llama, requests, answer) == []


def test_thinking_is_followed_through_chunks_and_cached_prefixes(llama, chunked):
    opening, closing = llama.tags
    base = _prompts(llama, [50], seed=3)[0]
    prompts = [
        [*base[:20], opening, *base[20:]],
        [*base[:20], opening, *base[20:40], closing, *base[40:]],
        [*base[:10], closing, *base[10:], opening],
    ]
    requests = [_request(prompt, THINKING, prompt_logprobs=0) for prompt in prompts]
    assert _wrong(llama, requests, chunked(*requests)) == []
    requests = [_request(prompt, THINKING) for prompt in prompts]
    answer = chunked(*requests)
    assert min(output["cached"] for output in answer["outputs"]) >= 32
    assert _wrong(llama, requests, answer) == []


def test_logprobs_of_prompts(llama, chunked):
    requests = _mixed(_prompts(llama, [5, 60, 30, 80, 9, 50, 70, 8, 40], 4), prompt_logprobs=0)
    answer = chunked(*requests)
    assert [len(output["prompt_logprobs"]) for output in answer["outputs"]] == [
        len(request["prompt"]) - 1 for request in requests
    ]
    assert _wrong(llama, requests, answer) == []


def test_several_samples_share_their_lambda(llama, chunked):
    dials = (0.0, 2.0, LINEAR)
    prompts = _prompts(llama, [10, 40, 20], seed=5)
    requests = [
        _request(prompt, dial, n=3, temperature=1.0)
        for prompt, dial in zip(prompts, dials, strict=True)
    ]
    answer = chunked(*requests)
    assert _wrong(llama, requests, answer) == []
    for output in answer["outputs"]:
        assert len({tuple(sample["tokens"]) for sample in output["samples"]}) == 3


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"lambda": "abc"}, "must be a number or a JSON object"),
        ({"lambda": True}, "must be a finite number"),
        ({"lambda": [1]}, "must be a finite number"),
        ({"lambda": 1e300}, "must be a finite number"),
        ({"lambda": {"kind": "linea"}}, "did you mean 'linear'"),
        ({"lamda": 1}, "did you mean 'lambda'"),
    ],
)
def test_a_malformed_lambda_is_an_error_for_its_request(llama, chunked, extra_args, message):
    [prompt] = _prompts(llama, [6])
    answer = chunked({"prompt": prompt, "extra_args": extra_args})
    assert "VLLMValidationError" in answer["error"]
    assert message in answer["error"]
    good = [_request(prompt, 0.5)]
    assert _wrong(llama, good, chunked(*good)) == []


def test_an_enormous_lambda_leaves_the_engine_and_the_others_well(llama, chunked):
    prompts = _prompts(llama, [6, 30, 50], seed=6)
    requests = [_request(prompt, 0.5) for prompt in prompts]
    answer = chunked(*requests, _request(prompts[0], 1e38))
    answer["outputs"].pop()
    assert _wrong(llama, requests, answer) == []


def test_drafts_are_verified_by_the_lambda_of_their_position(dialled, engine):
    """And a head that is untied, and biases."""
    repeating = {"initializer_range": 0.06}  # such a model's answers draft themselves
    qwen2 = dialled("qwen2", tie_word_embeddings=False, **repeating)
    drafts = {"method": "ngram", "num_speculative_tokens": 4}
    drafts |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    speculating = engine(qwen2.folder, max_num_batched_tokens=64, speculative_config=drafts)
    prompts = [prompt * 4 for prompt in _prompts(qwen2, [8, 6, 9, 7, 8, 5, 4, 10, 9], seed=8)]
    requests = _mixed(prompts, max_tokens=32)
    answer = speculating(*requests)
    assert _wrong(qwen2, requests, answer) == []
    assert answer["counters"]["drafted"] > answer["counters"]["accepted"] > 0


def test_a_preempted_request_keeps_its_lambda(dialled, engine):
    qwen3 = dialled("qwen3", tie_word_embeddings=True)
    crowded = engine(qwen3.folder, num_gpu_blocks_override=12, max_num_batched_tokens=256)
    requests = _mixed(_prompts(qwen3, [40, 50, 60, 30, 33, 45, 62, 58, 28], 9), max_tokens=40)
    answer = crowded(*requests)
    assert answer["counters"]["preemptions"] > 0
    assert _wrong(qwen3, requests, answer) == []


def test_both_streams_keep_to_a_sliding_window(dialled, engine):
    mistral = dialled("mistral", tie_word_embeddings=False, sliding_window=24)
    whole = dialled("mistral", tie_word_embeddings=False, sliding_window=None)
    sliding = engine(mistral.folder, max_num_batched_tokens=48)
    requests = _mixed(_prompts(mistral, [90, 40, 5, 100, 60, 30, 20, 70, 50], 10), max_tokens=24)
    answer = sliding(*requests)
    assert _wrong(mistral, requests, answer) == []
    assert len(_wrong(whole, requests, answer)) >= 7


def test_a_compiled_model(llama, engine):
    compiled = engine(llama.folder, enforce_eager=False, max_num_batched_tokens=64)
    requests = _mixed(_prompts(llama, [3, 40, 7, 90, 12, 33, 64, 5, 20], 11))
    assert _wrong(llama, requests, compiled(*requests)) == []


def test_two_processes_share_a_model(llama, engine, monkeypatch):
    """Each holds half of the heads and of the vocabulary."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else a NUMA node for each
    shared = engine(llama.folder, tensor_parallel_size=2, max_num_batched_tokens=48)
    requests = _mixed(_prompts(llama, [3, 40, 7, 90, 12, 33, 64, 5, 20], 14), prompt_logprobs=0)
    assert _wrong(llama, requests, shared(*requests)) == []


def test_an_identity_adapter_is_the_base_at_every_lambda(dialled, engine):
    """And an adapter of two layers."""
    plain = dialled("llama", noise=0.0, adapter_layers=2)
    serving = engine(plain.folder)
    [prompt] = _prompts(plain, [20], seed=12)
    answer = serving(*[_request(prompt, dial) for dial in (*LAMBDAS, LINEAR, JUMP, THINKING)])
    requests = [_request(prompt, 0.0)] * len(answer["outputs"])
    assert _wrong(plain, requests, answer) == []


def test_without_the_hook_the_engine_refuses_to_serve(llama, engine):
    with pytest.raises(RuntimeError, match="λ would not arrive: vLLM's GPUModelRunner does not"):
        engine(llama.folder, without=("hook",))


def test_without_hook_and_check_the_answers_are_wrong(llama, engine):
    """So the comparison of the other tests sees a λ that does not arrive."""
    unhooked = engine(llama.folder, without=("hook", "check"))
    prompts = _prompts(llama, [3, 40, 7, 90, 12, 33, 64, 5, 20])
    requests = [
        _request(prompt, dial, prompt_logprobs=0)
        for prompt, dial in zip(
            prompts, (0.0, 0.5, 1.0, 2.0, -0.5, 0.0, LINEAR, JUMP, 0.7), strict=True
        )
    ]
    assert len(_wrong(llama, requests, unhooked(*requests))) == 7
