"""A LoRA dial in vLLM: mixed λ in one batch, against one forward in float64 with λ per position."""

from dataclasses import replace

import pytest

from engine_requests import LAMBDAS, LINEAR, THINKING, mixed, prompts_of, request_of, wrong
from flexalign.lora_dial import LoRADialConfig
from flexalign.serving.vllm.folder import prepare_folder

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def llama(lora_dialled):
    return lora_dialled("llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def chunked(engine, llama):
    """Prompts longer than 48 tokens come in chunks, 32 tokens are a block of the prefix cache."""
    return engine(llama.folder, max_num_batched_tokens=48)


def test_mixed_lambda_in_one_batch(llama, chunked):
    requests = mixed(prompts_of(llama, [3, 40, 7, 90, 12, 33, 64, 5, 20, 100, 31, 32] * 2))
    assert wrong(llama, requests, chunked(*requests)) == []


def test_a_cached_prefix_serves_its_own_lambda_alone(llama, chunked):
    [prompt] = prompts_of(llama, [70], seed=1)
    first = [request_of(prompt, 1.0), request_of(prompt, LINEAR)]
    assert wrong(llama, first, chunked(*first)) == []
    # LINEAR begins at −0.5: the prompt is read at that λ, and yet another salt keeps it apart.
    dials = (*LAMBDAS, LINEAR, THINKING, None, 1.0 + 1e-6)
    requests = [request_of(prompt, dial) for dial in dials]
    answer = chunked(*requests)
    cached = dict(zip(map(str, dials), (one["cached"] for one in answer["outputs"]), strict=True))
    assert {dial for dial, tokens in cached.items() if tokens} == {"1.0", str(LINEAR)}
    assert cached["1.0"] == cached[str(LINEAR)] == 64
    assert wrong(llama, requests, answer) == []

    again = chunked(*requests)
    assert [output["cached"] for output in again["outputs"]] == [64] * len(requests)
    assert wrong(llama, requests, again) == []


def test_an_answer_is_a_prefix_of_the_next_turn_at_its_lambda(llama, chunked):
    [prompt, tail] = prompts_of(llama, [50, 9], seed=2)
    for dial, cached in ((2.0, 64), (0.25, 64), (LINEAR, 0)):
        request = request_of(prompt, dial, max_tokens=40)
        answer = chunked(request)
        longer = [*prompt, *answer["outputs"][0]["samples"][0]["tokens"], *tail]
        following = request_of(longer, dial)
        found = chunked(following)
        assert (found["outputs"][0]["cached"] >= cached > 0) or found["outputs"][0]["cached"] == 0
        assert (
            wrong(llama, [request, following], {"outputs": answer["outputs"] + found["outputs"]})
            == []
        )


def test_a_prompt_is_read_at_the_lambda_that_its_thinking_ends_in(llama, chunked):
    opening, closing = llama.tags
    base = prompts_of(llama, [50], seed=3)[0]
    prompts = [
        [*base[:20], opening, *base[20:]],
        [*base[:20], opening, *base[20:40], closing, *base[40:]],
        [*base[:10], closing, *base[10:], opening],
    ]
    for given in ({"prompt_logprobs": 0}, {}, {}):  # the first is never cached
        requests = [request_of(prompt, THINKING, **given) for prompt in prompts]
        answer = chunked(*requests)
        assert wrong(llama, requests, answer) == []
    assert min(output["cached"] for output in answer["outputs"]) == 32


def test_logprobs_of_prompts(llama, chunked):
    requests = mixed(prompts_of(llama, [5, 60, 30, 80, 9, 50, 70, 8, 40], 4), prompt_logprobs=0)
    answer = chunked(*requests)
    assert [len(output["prompt_logprobs"]) for output in answer["outputs"]] == [
        len(request["prompt"]) - 1 for request in requests
    ]
    assert wrong(llama, requests, answer) == []


def test_several_samples_share_their_lambda(llama, chunked):
    prompts = prompts_of(llama, [10, 40, 20], seed=5)
    requests = [
        request_of(prompt, dial, n=3, temperature=1.0)
        for prompt, dial in zip(prompts, (0.0, 2.0, LINEAR), strict=True)
    ]
    assert wrong(llama, requests, chunked(*requests)) == []


def test_a_malformed_lambda_is_an_error_for_its_request(llama, chunked):
    [prompt] = prompts_of(llama, [6])
    answer = chunked({"prompt": prompt, "extra_args": {"lambda": "abc"}})
    assert "must be a number or a JSON object" in answer["error"]
    good = [request_of(prompt, 0.5)]
    assert wrong(llama, good, chunked(*good)) == []


def test_drafts_are_verified_by_the_lambda_of_their_position(lora_dialled, engine):
    """And a head that is untied, and biases."""
    qwen2 = lora_dialled("qwen2", tie_word_embeddings=False, initializer_range=0.06)
    drafts = {"method": "ngram", "num_speculative_tokens": 4}
    drafts |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    speculating = engine(qwen2.folder, max_num_batched_tokens=64, speculative_config=drafts)
    prompts = [prompt * 4 for prompt in prompts_of(qwen2, [8, 6, 9, 7, 8, 5, 4, 10, 9], seed=8)]
    requests = mixed(prompts, max_tokens=32)
    answer = speculating(*requests)
    assert wrong(qwen2, requests, answer) == []
    assert answer["counters"]["drafted"] > answer["counters"]["accepted"] > 0


def test_a_preempted_request_keeps_its_lambda(lora_dialled, engine):
    """And a LoRA on two parts of a merged layer alone, scaled by the root of its rank."""
    lora = {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True}
    qwen3 = lora_dialled("qwen3", lora | {"rank_pattern": {}}, tie_word_embeddings=True)
    crowded = engine(qwen3.folder, num_gpu_blocks_override=12, max_num_batched_tokens=256)
    requests = mixed(prompts_of(qwen3, [40, 50, 60, 30, 33, 45, 62, 58, 28], 9), max_tokens=40)
    answer = crowded(*requests)
    assert answer["counters"]["preemptions"] > 0
    assert wrong(qwen3, requests, answer) == []


def test_a_sliding_window(lora_dialled, engine):
    mistral = lora_dialled("mistral", tie_word_embeddings=False, sliding_window=24)
    sliding = engine(mistral.folder, max_num_batched_tokens=48)
    requests = mixed(prompts_of(mistral, [90, 40, 5, 100, 60, 30, 20, 70, 50], 10), max_tokens=24)
    assert wrong(mistral, requests, sliding(*requests)) == []


def test_compiled_models_of_one_base_and_two_ranks(llama, engine, lora_dialled):
    """What is compiled for one LoRA is not taken for another, and is as good when it is loaded."""
    other = lora_dialled("llama", {"r": 3}, tie_word_embeddings=True)
    for dial in (llama, other, llama):
        compiled = engine(dial.folder, enforce_eager=False, max_num_batched_tokens=64)
        requests = mixed(prompts_of(dial, [3, 40, 7, 90, 12, 33, 64, 5, 20], 11))
        assert wrong(dial, requests, compiled(*requests)) == []


def test_two_processes_share_a_model(llama, engine, monkeypatch):
    """Each holds half of the heads, of B's rows there, and of A's columns where outputs are summed."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else a NUMA node for each
    shared = engine(llama.folder, tensor_parallel_size=2, max_num_batched_tokens=48)
    requests = mixed(prompts_of(llama, [3, 40, 7, 90, 12, 33, 64, 5, 20], 14), prompt_logprobs=0)
    assert wrong(llama, requests, shared(*requests)) == []
    [prompt] = prompts_of(llama, [70], seed=1)
    for dial in (0.0, 2.0, 2.0):
        requests = [request_of(prompt, dial)]
        answer = shared(*requests)
        assert wrong(llama, requests, answer) == []
    assert answer["outputs"][0]["cached"] == 64


def test_a_plain_lora_is_served_at_its_own_strength(llama, engine, tmp_path):
    """Without lora_dial.json; the engine takes any λ, the server in front 0 and 1 alone."""
    plain = tmp_path / "plain"
    llama.model.save_pretrained(plain)
    folder = prepare_folder(llama.base, plain, tmp_path / "folder")
    serving = engine(folder)
    [prompt] = prompts_of(llama, [20], seed=12)
    answer = serving(request_of(prompt), request_of(prompt, 0.0))
    requests = [request_of(prompt, 1.0), request_of(prompt, 0.0)]
    assert wrong(llama, requests, answer) == []


def test_without_the_hook_the_engine_refuses_to_serve(llama, engine):
    with pytest.raises(RuntimeError, match="λ would not arrive: vLLM's GPUModelRunner does not"):
        engine(llama.folder, without=("hook",))


def test_without_salt_the_engine_serves_without_a_prefix_cache_alone(llama, engine):
    with pytest.raises(RuntimeError, match="would share a cached prefix"):
        engine(llama.folder, without=("salt",))
    serving = engine(llama.folder, without=("salt",), enable_prefix_caching=False)
    [prompt] = prompts_of(llama, [70], seed=1)
    for dial in (0.0, 2.0):
        requests = [request_of(prompt, dial)]
        assert wrong(llama, requests, serving(*requests)) == []


def test_without_hook_and_check_the_answers_are_wrong(llama, engine):
    """So the comparison of the other tests sees a λ that does not arrive."""
    unhooked = engine(llama.folder, without=("hook", "check"))
    prompts = prompts_of(llama, [3, 40, 7, 90, 12, 33])
    dials = (0.0, 0.5, 1.0, 2.0, -0.5, LINEAR)
    requests = [request_of(p, dial) for p, dial in zip(prompts, dials, strict=True)]
    assert len(wrong(llama, requests, unhooked(*requests))) == 5


def test_the_default_lambda_is_the_dials_own(llama, engine, tmp_path):
    settings = replace(LoRADialConfig.load(llama.adapter), default_lambda=2.0)
    other = tmp_path / "other"
    llama.model.save_pretrained(other)
    settings.save(other)
    serving = engine(prepare_folder(llama.base, other, tmp_path / "folder"))
    requests = [request_of(prompts_of(llama, [20])[0])]
    assert wrong(llama._replace(default=2.0), requests, serving(*requests)) == []
