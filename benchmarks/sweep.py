"""A sweep of λ over one prefill, beside a run for each λ.

Run it from the repository:

    python benchmarks/sweep.py             # a prompt of 512 tokens at 8 λ, minutes on one core
    python benchmarks/sweep.py --quick     # a prompt of 64 tokens, half a minute

The model has the shape of SmolLM2-135M (30 layers, width 576, vocabulary 49152) with random
weights in float32, and an adapter. Both ways write the same tokens; they take turns, and a figure
is the median of its CPU times, which other work on the machine disturbs least.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexalign.inra import InRaModel

SHAPE = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
LAMS = [-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a shorter prompt")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way")
    arguments = parser.parse_args()
    prompt, new_tokens = (64, (16,)) if arguments.quick else (512, (16, 64))

    torch.manual_seed(0)
    model = InRaModel.create(LlamaForCausalLM(SHAPE).eval())
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.inra_config = replace(model.inra_config, lambda_range=(-1, 3))
    tokens = torch.randint(3, SHAPE.vocab_size, (1, prompt))
    mask = torch.ones_like(tokens)
    for new in new_tokens:
        options = {"attention_mask": mask, "max_new_tokens": new, "eos_token_id": None}

        def separate(options: dict = options) -> torch.Tensor:
            return torch.cat([model.generate(tokens, lam=lam, **options) for lam in LAMS])

        def swept(options: dict = options) -> torch.Tensor:
            return model.sweep(tokens, lams=LAMS, **options)

        same = float((separate() == swept()).float().mean())
        times: dict[Callable, list[float]] = {separate: [], swept: []}
        for _ in range(arguments.rounds):
            for run, taken in times.items():
                taken.append(cpu_seconds(run))
        apart, together = (statistics.median(taken) for taken in times.values())
        print(
            f"prompt {prompt}, {len(LAMS)} λ, {new} new tokens: separate {apart:.2f} s, "
            f"sweep {together:.2f} s, {apart / together:.1f}× faster; "
            f"{same:.0%} of the tokens are the same",
            flush=True,
        )


if __name__ == "__main__":
    main()
