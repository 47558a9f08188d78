"""A real model with a dial: two adapters for concise answers, by SFT and by DPO, at several λ.

    python examples/smollm2/dial.py --data instructions.json            # about half an hour
    python examples/smollm2/dial.py --data instructions.json --quick    # some minutes

Stages whose result is there are passed over, so a run that was broken off goes on where it stopped.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from concise import read_rows, split, write_rows
from measure import Row, difference, measure
from report import samples, table
from run import HERE, SEED, claim, flexalign, parse_arguments, stage

from flexalign import InRaModel
from flexalign.generation.responses import generate_responses
from flexalign.models.loading import load_model, load_tokenizer

METHODS = {"sft": "concise.jsonl", "dpo": "pairs.jsonl"}


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        held_out: Prompts of the measurements.
        pairs: Preferences that DPO learns from.
        answer_tokens: Where a measured answer is cut off.
        lams: λ of the measured answers, 0 first.
        max_steps: Steps of each adapter's training; None for what the recipes say.
    """

    held_out: int
    pairs: int
    answer_tokens: int
    lams: tuple[float, ...]
    max_steps: int | None


FULL = Sizes(64, 96, 256, (0.0, 0.5, 1.0, 2.0), None)
QUICK = Sizes(16, 24, 96, (0.0, 1.0), 8)


def main() -> None:
    """Run what is missing and write the report."""
    options = parse_arguments(__doc__, Path("out/smollm2-dial"), quick="small sizes, λ = 0 and 1")
    sizes = QUICK if options.quick else FULL
    base, output = options.reference, options.output
    output.mkdir(parents=True, exist_ok=True)
    claim(output, {"base": base, "seed": SEED, **asdict(sizes)})
    start = time.monotonic()
    with stage("split the data"):
        parts = split(options.data, held_out=sizes.held_out, seed=SEED)
        write_rows(output / "held_out.jsonl", parts.held_out)
        write_rows(output / "concise.jsonl", parts.concise)
        write_rows(output / "pairs.jsonl", parts.pairs[: sizes.pairs])
    for method in METHODS:
        with stage(f"train an adapter by {method.upper()}"):
            _adapt(base, method, output, sizes.max_steps)
    for method in METHODS:
        lams = sizes.lams if method == "sft" else sizes.lams[1:]
        with stage(f"answers of the {method.upper()} adapter at λ = {_listed(lams)}"):
            _answer(base, method, lams, output, sizes.answer_tokens)
    with stage("measure"):
        make_report(output, base, sizes.lams)
    print(f"\n{output / 'report.md'}; {(time.monotonic() - start) / 60:.1f} minutes")


def make_report(output: Path, base: str, lams: Sequence[float]) -> None:
    """Measure the answers; write ``report.json`` and ``report.md``."""
    systems = [("base", "sft", 0.0)]
    systems += [(method, method, lam) for method in METHODS for lam in lams if lam != 0.0]
    answers = {
        (name, lam): read_rows(_answers(output, method, lam)) for name, method, lam in systems
    }
    model, tokenizer = load_model(base), load_tokenizer(base)
    plain = answers["base", 0.0]
    rows: list[Row] = []
    for (name, lam), given in answers.items():
        figures = measure(given, model, tokenizer)
        against = difference(given, plain)
        label = "reference" if name == "base" else f"{name.upper()} adapter"
        rows.append({"system": label, "lambda": lam, **figures, "difference": against})
    text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    (output / "report.json").write_text(text, encoding="utf-8")
    sections = [table(rows)]
    for (name, lam), given in answers.items():
        label = "base" if name == "base" else f"{name.upper()} adapter"
        sections.append(samples(f"{label}, λ = {lam:g}", given))
    (output / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _adapt(base: str, method: str, output: Path, max_steps: int | None) -> None:
    settings: dict[str, Any] = {
        "base": base,
        "data": output / METHODS[method],
        "output": output / f"adapter_{method}",
    }
    if max_steps is not None:
        settings["training.max_steps"] = max_steps
    flexalign(
        *("adapt", HERE / f"adapter_{method}.yaml"),
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
    )


def _answer(
    base: str, method: str, lams: Sequence[float], output: Path, answer_tokens: int
) -> None:
    missing = [lam for lam in lams if not _answers(output, method, lam).exists()]
    if not missing:
        return
    model = InRaModel.from_pretrained(base, output / f"adapter_{method}")
    tried = (min(0.0, *lams), max(1.0, *lams))
    model.inra_config = replace(model.inra_config, lambda_range=tried)
    prompts = [row["prompt"] for row in read_rows(output / "held_out.jsonl")]
    for lam in missing:
        responses = generate_responses(
            model,
            load_tokenizer(base),
            prompts,
            max_new_tokens=answer_tokens,
            temperature=0.7,
            top_p=0.95,
            batch_size=64,
            seeds=range(len(prompts)),
            lam=lam,
        )
        path = _answers(output, method, lam)
        path.parent.mkdir(exist_ok=True)
        rows = [
            {
                "prompt": prompt,
                "completion": [{"role": "assistant", "content": response.text}],
                "prompt_index": index,
                "tokens": response.tokens,
                "truncated": response.truncated,
            }
            for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]
        write_rows(path, rows)


def _answers(output: Path, method: str, lam: float) -> Path:
    return output / "answers" / f"{method}-lambda={lam:g}.jsonl"


def _listed(lams: Sequence[float]) -> str:
    return ", ".join(f"{lam:g}" for lam in lams)


if __name__ == "__main__":
    main()
