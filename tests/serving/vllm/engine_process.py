"""An engine of vLLM in a process of its own: JSON lines in, JSON lines out.

Run as ``python engine_process.py SETTINGS`` where SETTINGS is a JSON object: ``options`` of
``vllm.LLM``, and ``without``, the parts of the plugin to leave out ("hook", "check", "salt").
"""

import json
import os
import sys

_COUNTERS = {
    "vllm:prefix_cache_hits": "prefix_hits",
    "vllm:num_preemptions": "preemptions",
    "vllm:spec_decode_num_draft_tokens": "drafted",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is not an answer
    settings = json.loads(sys.argv[1])
    _leave_out(settings["without"])
    from vllm import LLM

    llm = LLM(**settings["options"])
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(llm, json.loads(line))), file=answers, flush=True)


def _leave_out(parts: list[str]) -> None:
    from flexalign.serving.vllm import plugin, runner_v1

    if "hook" in parts:
        runner_v1.install = lambda: None
    if "check" in parts:
        runner_v1.require_delivery = lambda: None
    if "salt" in parts:
        plugin.separate_prefixes = lambda: None


def _answer(llm, requests: list[dict]) -> dict:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=request.pop("prompt")) for request in requests]
    defaults = {"temperature": 0.0, "logprobs": 0}
    try:
        params = [SamplingParams(**defaults | request) for request in requests]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    counters = {_COUNTERS[m.name]: m.value for m in llm.get_metrics() if m.name in _COUNTERS}
    return {"outputs": [_read(output) for output in outputs], "counters": counters}


def _read(output) -> dict:
    return {
        "cached": output.num_cached_tokens,
        "prompt_logprobs": _chosen(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:]),
        "samples": [
            {"tokens": list(one.token_ids), "logprobs": _chosen(one.token_ids, one.logprobs)}
            for one in output.outputs
        ],
    }


def _chosen(tokens, logprobs) -> list[float]:
    return [step[token].logprob for token, step in zip(tokens, logprobs, strict=False)]


if __name__ == "__main__":
    main()
