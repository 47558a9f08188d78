"""The plugin in vLLM: mixed λ in one batch, against equation 5 over two whole models."""

import pytest

from engine_requests import JUMP, LAMBDAS, LINEAR, THINKING, mixed, prompts_of, request_of, wrong

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def llama(dialled):
    return dialled("llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def chunked(engine, llama):
    """Prompts longer than 48 tokens come in chunks, 32 tokens are a block of the prefix cache."""
    return engine(llama.folder, max_num_batched_tokens=48)


def test_mixed_lambda_in_one_batch(llama, chunked):
    requests = mixed(prompts_of(llama, [3, 40, 7, 90, 12, 33, 64, 5, 20, 100, 31, 32] * 2))
    assert wrong(llama, requests, chunked(*requests)) == []


def test_a_cached_prefix_serves_every_lambda(llama, chunked):
    [prompt] = prompts_of(llama, [70], seed=1)
    first = [request_of(prompt, 1.0)]
    assert wrong(llama, first, chunked(*first)) == []
    [tail] = prompts_of(llama, [9], seed=2)
    requests = [request_of(prompt + tail, dial) for dial in (*LAMBDAS, LINEAR, THINKING)]
    answer = chunked(*requests)
    assert [output["cached"] for output in answer["outputs"]] == [64] * len(requests)
    assert wrong(llama, requests, answer) == []


def test_thinking_is_followed_through_chunks_and_cached_prefixes(llama, chunked):
    opening, closing = llama.tags
    base = prompts_of(llama, [50], seed=3)[0]
    prompts = [
        [*base[:20], opening, *base[20:]],
        [*base[:20], opening, *base[20:40], closing, *base[40:]],
        [*base[:10], closing, *base[10:], opening],
    ]
    requests = [request_of(prompt, THINKING, prompt_logprobs=0) for prompt in prompts]
    assert wrong(llama, requests, chunked(*requests)) == []
    requests = [request_of(prompt, THINKING) for prompt in prompts]
    answer = chunked(*requests)
    assert min(output["cached"] for output in answer["outputs"]) >= 32
    assert wrong(llama, requests, answer) == []


def test_logprobs_of_prompts(llama, chunked):
    requests = mixed(prompts_of(llama, [5, 60, 30, 80, 9, 50, 70, 8, 40], 4), prompt_logprobs=0)
    answer = chunked(*requests)
    assert [len(output["prompt_logprobs"]) for output in answer["outputs"]] == [
        len(request["prompt"]) - 1 for request in requests
    ]
    assert wrong(llama, requests, answer) == []


def test_several_samples_share_their_lambda(llama, chunked):
    dials = (0.0, 2.0, LINEAR)
    prompts = prompts_of(llama, [10, 40, 20], seed=5)
    requests = [
        request_of(prompt, dial, n=3, temperature=1.0)
        for prompt, dial in zip(prompts, dials, strict=True)
    ]
    answer = chunked(*requests)
    assert wrong(llama, requests, answer) == []
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
    [prompt] = prompts_of(llama, [6])
    answer = chunked({"prompt": prompt, "extra_args": extra_args})
    assert "VLLMValidationError" in answer["error"]
    assert message in answer["error"]
    good = [request_of(prompt, 0.5)]
    assert wrong(llama, good, chunked(*good)) == []


def test_an_enormous_lambda_leaves_the_engine_and_the_others_well(llama, chunked):
    prompts = prompts_of(llama, [6, 30, 50], seed=6)
    requests = [request_of(prompt, 0.5) for prompt in prompts]
    answer = chunked(*requests, request_of(prompts[0], 1e38))
    answer["outputs"].pop()
    assert wrong(llama, requests, answer) == []


def test_drafts_are_verified_by_the_lambda_of_their_position(dialled, engine):
    """And a head that is untied, and biases."""
    repeating = {"initializer_range": 0.06}  # such a model's answers draft themselves
    qwen2 = dialled("qwen2", tie_word_embeddings=False, **repeating)
    drafts = {"method": "ngram", "num_speculative_tokens": 4}
    drafts |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    speculating = engine(qwen2.folder, max_num_batched_tokens=64, speculative_config=drafts)
    prompts = [prompt * 4 for prompt in prompts_of(qwen2, [8, 6, 9, 7, 8, 5, 4, 10, 9], seed=8)]
    requests = mixed(prompts, max_tokens=32)
    answer = speculating(*requests)
    assert wrong(qwen2, requests, answer) == []
    assert answer["counters"]["drafted"] > answer["counters"]["accepted"] > 0


def test_a_preempted_request_keeps_its_lambda(dialled, engine):
    qwen3 = dialled("qwen3", tie_word_embeddings=True)
    crowded = engine(qwen3.folder, num_gpu_blocks_override=12, max_num_batched_tokens=256)
    requests = mixed(prompts_of(qwen3, [40, 50, 60, 30, 33, 45, 62, 58, 28], 9), max_tokens=40)
    answer = crowded(*requests)
    assert answer["counters"]["preemptions"] > 0
    assert wrong(qwen3, requests, answer) == []


def test_both_streams_keep_to_a_sliding_window(dialled, engine):
    mistral = dialled("mistral", tie_word_embeddings=False, sliding_window=24)
    whole = dialled("mistral", tie_word_embeddings=False, sliding_window=None)
    sliding = engine(mistral.folder, max_num_batched_tokens=48)
    requests = mixed(prompts_of(mistral, [90, 40, 5, 100, 60, 30, 20, 70, 50], 10), max_tokens=24)
    answer = sliding(*requests)
    assert wrong(mistral, requests, answer) == []
    assert len(wrong(whole, requests, answer)) >= 7


def test_a_compiled_model(llama, engine):
    compiled = engine(llama.folder, enforce_eager=False, max_num_batched_tokens=64)
    requests = mixed(prompts_of(llama, [3, 40, 7, 90, 12, 33, 64, 5, 20], 11))
    assert wrong(llama, requests, compiled(*requests)) == []


def test_two_processes_share_a_model(llama, engine, monkeypatch):
    """Each holds half of the heads and of the vocabulary."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else a NUMA node for each
    shared = engine(llama.folder, tensor_parallel_size=2, max_num_batched_tokens=48)
    requests = mixed(prompts_of(llama, [3, 40, 7, 90, 12, 33, 64, 5, 20], 14), prompt_logprobs=0)
    assert wrong(llama, requests, shared(*requests)) == []


def test_an_identity_adapter_is_the_base_at_every_lambda(dialled, engine):
    """And an adapter of two layers."""
    plain = dialled("llama", noise=0.0, adapter_layers=2)
    serving = engine(plain.folder)
    [prompt] = prompts_of(plain, [20], seed=12)
    answer = serving(*[request_of(prompt, dial) for dial in (*LAMBDAS, LINEAR, JUMP, THINKING)])
    requests = [request_of(prompt, 0.0)] * len(answer["outputs"])
    assert wrong(plain, requests, answer) == []


def test_without_the_hook_the_engine_refuses_to_serve(llama, engine):
    with pytest.raises(RuntimeError, match="λ would not arrive: vLLM's GPUModelRunner does not"):
        engine(llama.folder, without=("hook",))


def test_without_hook_and_check_the_answers_are_wrong(llama, engine):
    """So the comparison of the other tests sees a λ that does not arrive."""
    unhooked = engine(llama.folder, without=("hook", "check"))
    prompts = prompts_of(llama, [3, 40, 7, 90, 12, 33, 64, 5, 20])
    requests = [
        request_of(prompt, dial, prompt_logprobs=0)
        for prompt, dial in zip(
            prompts, (0.0, 0.5, 1.0, 2.0, -0.5, 0.0, LINEAR, JUMP, 0.7), strict=True
        )
    ]
    assert len(wrong(llama, requests, unhooked(*requests))) == 7
