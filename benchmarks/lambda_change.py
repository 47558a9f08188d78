"""A λ that changes inside a sequence: how far a LoRA dial is from equation 5 after the change.

    python benchmarks/lambda_change.py    # some minutes on one core

A layer's keys and values depend on λ. Where λ changes inside a sequence, the cache holds the earlier
tokens as their own λ made them, and nothing is run again. Here the miniature's LoRA dial answers at
one λ for 12 tokens and at another from there on. At every token after the change, three
distributions are compared by their total variation:

* *kept*: the dial, its cache as it is;
* *read again*: the dial, the same prefix read anew at the λ after the change;
* *pair*: equation 5 of the pair, with the gate that the dial was trained with.

*read again* to *pair* is what the training left over, which is there without any change; *what
turns* is the total variation between equation 5 at the two λ, at the same tokens. The report goes
to benchmarks/results/lambda_change.md.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flexalign.fusion import fuse
from flexalign.lora_dial import LoRADial
from flexalign.miniature import make_questions
from flexalign.models.pair import ModelPair
from flexalign.statistics import clustered_interval

REPORT = Path("benchmarks/results/lambda_change.md")
CHANGES = ((0.0, 1.0), (1.0, 0.0), (0.0, 2.0), (2.0, 0.0), (1.0, 3.0), (0.0, 5.0), (5.0, 0.0))
QUESTIONS = 300
KEPT_TOKENS = 12
"""Generated tokens before the change."""
NEAR = 4
"""Tokens after the change that count as near to it."""
LONGEST = 400


def responses(dial: LoRADial, before: float, after: float) -> tuple[Tensor, Tensor, int]:
    """Sample responses whose λ changes; return the tokens, the attention mask, the prompt's length."""
    tokenizer = dial.tokenizer
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question.text}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for question in make_questions(QUESTIONS, 51)
    ]
    inputs = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    torch.manual_seed(0)
    table = torch.tensor([[before] * KEPT_TOKENS + [after]]).expand(QUESTIONS, -1)
    prompt = inputs["input_ids"].shape[1]
    tokens = dial.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        lam=table,
        max_new_tokens=LONGEST,
        do_sample=True,
        top_k=0,
    )

    # After the end of a response there is padding, and its last token is that of the end.
    ended = tokens[:, prompt:] == tokenizer.eos_token_id
    written = (ended.cumsum(1) - ended.long()) == 0
    return tokens, torch.cat([inputs["attention_mask"], written.long()], 1), prompt


def variation(one: Tensor, other: Tensor) -> Tensor:
    """Return the total variation between two distributions, given as logits (…, V)."""
    return 0.5 * (one.softmax(-1) - other.softmax(-1)).abs().sum(-1)


@torch.no_grad()
def compare(dial: LoRADial, pair: ModelPair, before: float, after: float) -> str:
    """Return the row of the table for one change."""
    tokens, mask, prompt = responses(dial, before, after)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}

    # The token at prompt + i is predicted at the place before it, which is read at the i-th λ.
    lam = torch.full(tokens.shape, after)
    lam[:, : prompt + KEPT_TOKENS - 1] = before
    kept = dial(**inputs, lam=lam).logits
    again = dial(**inputs, lam=after).logits
    sides = [pair.logits(side, **inputs) for side in ("reference", "aligned")]
    gate = dial.dial_config.gate
    fused = fuse(*sides, after, gate)
    values = {
        "change": variation(kept, again),
        "kept": variation(kept, fused),
        "again": variation(again, fused),
        "turns": variation(fuse(*sides, before, gate), fused),
    }

    predicted = mask.bool()
    predicted[:, : prompt + KEPT_TOKENS] = False
    predicted = predicted[:, 1:]
    question, place = predicted.nonzero(as_tuple=True)
    found = {name: value[:, :-1][predicted].double().numpy() for name, value in values.items()}
    is_near = (place < prompt + KEPT_TOKENS - 1 + NEAR).numpy()

    def mean(name: str) -> str:
        low, middle, high = clustered_interval(found[name], question.numpy(), share=False)
        return f"{middle:.4f} [{low:.4f}, {high:.4f}]"

    cells = [
        f"{before:g} → {after:g}",
        str(len(question)),
        mean("change"),
        f"{found['change'][is_near].mean():.4f}",
        f"{np.quantile(found['change'], 0.95):.4f}",
        mean("kept"),
        mean("again"),
        mean("turns"),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    torch.set_num_threads(1)
    dial = LoRADial.from_pretrained("miniature", "miniature:dial")
    pair = ModelPair.load("miniature")
    lines = [
        f"`python benchmarks/lambda_change.py`: {QUESTIONS} responses of the miniature's LoRA dial "
        f"(gate {dial.dial_config.gate:g}), λ changed after {KEPT_TOKENS} tokens; total variation "
        "for each token after the change, 95 % intervals clustered by question. What the columns "
        "mean: the script's head.",
        "",
        f"| λ | tokens | kept to read again | the same, first {NEAR} tokens | the same, 95th "
        "percentile | kept to pair | read again to pair | what turns |",
        "|---|--:|---|--:|--:|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for before, after in CHANGES:
        lines.append(compare(dial, pair, before, after))
        print(lines[-1], flush=True)
    REPORT.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
