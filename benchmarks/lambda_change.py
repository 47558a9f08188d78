"""How far a λ that changes inside a sequence is from equation 5, with a LoRA dial.

Run it from the repository:

    python benchmarks/lambda_change.py --adapter out/dial     # a minute on one core

A LoRA dial keeps each token's keys and values at the λ at which it was read. On responses of the
miniature's reference, λ goes from one value to another in the middle; at the tokens after that, the
dial's distribution is compared with that of the pair at the second λ (total variation, mean), beside
a sequence that was at the second λ throughout.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _machine import machine
from torch import Tensor

from flexalign.fusion import fuse
from flexalign.lora_dial import LoRADial
from flexalign.miniature import make_traces
from flexalign.miniature.build import encode
from flexalign.models.loading import load_model, load_tokenizer

CHANGES = [(0.0, 1.0), (0.0, 3.0), (0.0, 5.0), (1.0, 3.0), (5.0, 0.0)]
DISTANCES = {"1 to 4": (0, 4), "5 to 16": (4, 16), "from 17": (16, 10_000)}
BATCH = 32
RESULTS = Path(__file__).parent / "results" / "lambda_change.json"


def batches(count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return tokens and masks, and where each row's λ changes: half of its response."""
    tokenizer: Any = load_tokenizer("miniature")
    rows = []
    for trace in make_traces(count, 11):
        words = trace["completion"][0]["content"].split()
        prompt, response = encode(tokenizer, trace["prompt"][0]["content"], words)
        rows.append((prompt + response, len(prompt) + len(response) // 2))

    made = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        width = max(len(ids) for ids, _ in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (tokens, _) in enumerate(part):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        made.append((ids, mask, torch.tensor([place for _, place in part])))
    return made


@torch.no_grad()
def measure(adapter: str, count: int) -> list[dict[str, Any]]:
    """Return a row for each change: the mean total variation from equation 5, by distance."""
    dial = LoRADial.from_pretrained("miniature", adapter)
    reference, aligned = load_model("miniature:reference"), load_model("miniature:aligned")
    gate = dial.dial_config.gate
    sums = torch.zeros(len(CHANGES), 2, len(DISTANCES), dtype=torch.float64)
    counts = torch.zeros(len(DISTANCES), dtype=torch.float64)

    for ids, mask, places in batches(count):
        given = {"input_ids": ids, "attention_mask": mask}
        ends = reference(**given).logits, aligned(**given).logits
        distance = torch.arange(ids.shape[1]) - places[:, None]
        # The last token of a row predicts nothing.
        real = (distance >= 0) & mask.bool() & (torch.roll(mask, -1, 1) > 0)
        bins = [real & (distance >= low) & (distance < high) for low, high in DISTANCES.values()]
        counts += torch.tensor([float(one.sum()) for one in bins])

        for number, (before, after) in enumerate(CHANGES):
            wanted = fuse(*ends, after, gate).softmax(-1)
            table = torch.where(distance < 0, before, after)
            for way, lam in enumerate((after, table)):
                found = dial(**given, lam=lam).logits.softmax(-1)
                off = (found - wanted).abs().sum(-1) / 2
                sums[number, way] += torch.stack([off[one].double().sum() for one in bins])

    means = (sums / counts).tolist()
    return [
        {"from": before, "to": after, "tokens after the change": name}
        | {"throughout": means[number][0][place], "changed": means[number][1][place]}
        for number, (before, after) in enumerate(CHANGES)
        for place, name in enumerate(DISTANCES)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", default="miniature:dial", help="a LoRA dial on the miniature")
    parser.add_argument("--traces", type=int, default=320)
    options = parser.parse_args()

    rows = measure(options.adapter, options.traces)
    print("mean total variation from equation 5 at the second λ")
    for row in rows:
        print(
            f"λ {row['from']:g} → {row['to']:g}, {row['tokens after the change']:>8}: "
            f"throughout {row['throughout']:.4f}, changed {row['changed']:.4f}"
        )
    RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
