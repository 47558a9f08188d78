"""Requests to an engine of vLLM with a dial, and what its answers are held against."""

import random
from typing import Any

import torch

LAMBDAS = (0.0, 0.5, 1.0, 2.0, -0.5)
LINEAR = {"kind": "linear", "start": -0.5, "end": 1.5, "steps": 8}
JUMP = '{"kind": "piecewise", "points": [[0, 1.0], [4, 1.0], [4, 0.0]]}'
THINKING = {"kind": "thinking", "think": 0.2, "answer": 1.0, "budget": 9, "end": 2.0}
TOLERANCE = 2e-4


def prompts_of(dialled, lengths, seed=0):
    draw = random.Random(seed)
    size = dialled.model.config.vocab_size
    return [[draw.randrange(6, size) for _ in range(length)] for length in lengths]


def request_of(prompt, dial=None, **sampling) -> dict[str, Any]:
    extra = {} if dial is None else {"extra_args": {"lambda": dial}}
    return {"prompt": prompt, "max_tokens": 12, "ignore_eos": True, **extra, **sampling}


def mixed(prompts, **sampling):
    dials = [*LAMBDAS, LINEAR, JUMP, THINKING, None]
    return [request_of(p, dials[i % len(dials)], **sampling) for i, p in enumerate(prompts)]


def wrong(dialled, requests, answer) -> list[str]:
    """Name each request whose tokens are not the likeliest, or log-probabilities not equation 5's."""
    assert "error" not in answer, answer["error"]
    assert len(answer["outputs"]) == len(requests)
    found_wrong = []
    for request, output in zip(requests, answer["outputs"], strict=True):
        prompt = request["prompt"]
        dial = request.get("extra_args", {}).get("lambda", dialled.default)
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
                found_wrong.append(f"{dial}: regret {regret:.1e}, error {error:.1e}")
    return found_wrong
