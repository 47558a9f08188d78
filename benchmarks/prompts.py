"""One model under two prompts, on SmolLM2-135M: the pair while decoding, and students of it.

    make smollm2
    python benchmarks/prompts.py --data alpaca_en_demo.json           # about 20 minutes of one core
    python benchmarks/prompts.py --data alpaca_en_demo.json --quick   # a few minutes, nothing kept
    python benchmarks/prompts.py --data … --rewrite                   # only the table of what is there

Without --data the file of that name in the folder of FLEXALIGN_DATA is taken, if there is one.

λ = 0 is the model as it is, λ = 1 the same model told "Answer in one short sentence.". *Pair* is
equation 5 while decoding, two streams of one model. *Peer* is transformers' ``generate`` with the
plain model under each prompt, with the same seeds. *Students* are LoRAs that TrRa trains on the
model's own answers (off-policy) or on their own (on-policy), asked without the system message. The
file is Alpaca's form; LLaMA-Factory's demonstration data was used. What is done is kept in `--work`
and passed over when the command is given again.
"""

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _document import put_section

from flexalign._storage import write_json, write_text
from flexalign.data import SamplingSettings, load_prompts
from flexalign.data.prompting import PromptSettings
from flexalign.evaluation.tasks import DATA_VARIABLE
from flexalign.generation.responses import Response, generate_responses
from flexalign.generation.two_prompts import TwoPromptDecoder
from flexalign.models.loading import load_adapter, load_model, load_tokenizer
from flexalign.models.prompted import PairRendering, PromptPair
from flexalign.statistics import clustered_interval, paired_difference_interval
from flexalign.systems import sample
from flexalign.training import realign

MODEL = "smollm2"
SYSTEM = "Answer in one short sentence."
LAMBDAS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
STUDENTS = tuple((lam, rollouts) for lam in (1.0, 2.0) for rollouts in (0.0, 1.0))
RAW = Path("benchmarks/results/prompts.json")
REPORT = Path("benchmarks/results/prompts.md")
SEED = 0
LONGEST_PROMPT = 60
"""Words of a prompt at most."""


@dataclass(frozen=True)
class Sizes:
    """How much is sampled and trained."""

    held_out: int = 32
    traces: int = 64
    answer_tokens: int = 96
    trace_tokens: int = 48
    steps: int = 16
    rows: int = 4


QUICK = Sizes(held_out=4, traces=8, answer_tokens=16, trace_tokens=8, steps=2, rows=2)


def main() -> None:
    """Run what is missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="instructions, such as alpaca_en_demo.json")
    parser.add_argument("--work", type=Path, default=Path("out/prompts"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rewrite", action="store_true", help="only write the table again")
    chosen = parser.parse_args()
    folder = os.environ.get(DATA_VARIABLE)
    data = chosen.data or (folder and Path(folder) / "alpaca_en_demo.json")
    if not data or not data.is_file():
        print(
            f"prompts: skipped, as neither --data nor {DATA_VARIABLE} (alpaca_en_demo.json in its "
            "folder) names instructions"
        )
        return

    sizes = QUICK if chosen.quick else Sizes()
    work = chosen.work / "quick" if chosen.quick else chosen.work
    work.mkdir(parents=True, exist_ok=True)
    collected = collect if chosen.rewrite else measure
    results = collected(data, work, sizes)
    if chosen.quick:
        print(report(results))
        return
    write_json(RAW, results)
    write_text(REPORT, report(results))
    put_section("prompts", section(results))


def measure(data: Path, work: Path, sizes: Sizes) -> dict[str, Any]:
    """Answer the held-out prompts by every system, and return all rows."""
    asked, training = split(data, sizes)
    tokenizer = load_tokenizer(MODEL)
    prompts = PromptPair(aligned=PromptSettings(system=SYSTEM))
    rendering = PairRendering(tokenizer, prompts)
    model = load_model(MODEL, dtype=torch.float32)

    def answer(name: str, system: Any, given: Sequence[Any], **options: Any) -> None:
        kept(
            work / f"{name}.json",
            lambda: [
                {"tokens": each.tokens, "truncated": each.truncated, "text": each.text}
                for each in _answers(system, tokenizer, given, sizes, **options)
            ],
        )

    both = [rendering.both(messages) for messages in asked]
    decoder = TwoPromptDecoder(model, rendering)
    for lam in LAMBDAS:
        answer(f"pair {lam:g}", decoder, both, lam=lam)
    for side, lam in (("reference", 0), ("aligned", 1)):
        messages = [rendering.messages(side, each) for each in asked]
        answer(f"peer {lam}", model, messages)

    traces = work / "traces.jsonl"
    for lam, rollouts in STUDENTS:
        name = f"{'on' if rollouts else 'off'}-policy {lam:g}"
        if (work / f"{name}.json").exists():
            continue
        output = train(lam, rollouts, make_traces(training, traces, sizes), work / name, sizes)
        student = load_adapter(load_model(MODEL, dtype=torch.float32), output)
        answer(name, student, asked)

    return collect(data, work, sizes)


def collect(data: Path, work: Path, sizes: Sizes) -> dict[str, Any]:
    """Return the rows of all that is measured, and the names of what is not."""
    asked, _ = split(data, sizes)
    wanted = [f"pair {lam:g}" for lam in LAMBDAS] + ["peer 0", "peer 1"]
    wanted += [f"{'on' if rollouts else 'off'}-policy {lam:g}" for lam, rollouts in STUDENTS]
    names = [name for name in wanted if (work / f"{name}.json").is_file()]
    answers = {name: json.loads((work / f"{name}.json").read_text("utf-8")) for name in names}
    return {
        "sizes": vars(sizes),
        "data": data.name,
        "missing": [name for name in wanted if name not in names],
        "rows": [row_of(name, answers) for name in names],
        "first": {name: answers[name]["value"][0]["text"] for name in names},
        "first_prompt": asked[0][-1]["content"],
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
    }


def split(data: Path, sizes: Sizes) -> tuple[list[Any], list[Any]]:
    """Return the held-out prompts, and those of the training, each once, in a fixed order."""
    found = {json.dumps(prompt): prompt for prompt in load_prompts(data)["prompt"]}
    short = [
        prompt for prompt in found.values() if len(prompt[-1]["content"].split()) <= LONGEST_PROMPT
    ]
    random.Random(SEED).shuffle(short)
    return short[: sizes.held_out], short[sizes.held_out :][: sizes.traces]


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Return what a file holds; make it and note the seconds if there is none."""
    if not path.exists():
        since = time.process_time()
        value = make()
        write_json(path, {"value": value, "seconds": time.process_time() - since})
        print(f"{path.stem}: {time.process_time() - since:.0f} s", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))["value"]


def _answers(
    system: Any, tokenizer: Any, prompts: Sequence[Any], sizes: Sizes, **options: Any
) -> list[Response]:
    return generate_responses(
        system,
        tokenizer,
        prompts,
        max_new_tokens=sizes.answer_tokens,
        temperature=0.7,
        top_p=0.95,
        batch_size=sizes.held_out,
        seeds=list(range(len(prompts))),
        **options,
    )


def make_traces(prompts: Sequence[Any], output: Path, sizes: Sizes) -> Path:
    """Sample the model's own answers, without the system message, to train on."""
    questions = output.with_name("prompts.jsonl")
    write_text(questions, "".join(f"{json.dumps({'messages': each})}\n" for each in prompts))
    settings = SamplingSettings(max_new_tokens=sizes.trace_tokens, batch_size=48, seed=SEED)
    since = time.process_time()
    sample(MODEL, questions, output, settings)
    print(f"traces: {time.process_time() - since:.0f} s", flush=True)
    return output


def train(lam: float, rollouts: float, traces: Path, output: Path, sizes: Sizes) -> Path:
    """Train one student, or go on with it; return its folder."""
    recipe = {
        "reference": MODEL,
        "aligned": {"model": MODEL, "system": SYSTEM},
        "data": str(traces),
        "output": str(output),
        "lambda": lam,
        "rollouts": rollouts,
        "rollout_max_new_tokens": sizes.trace_tokens if rollouts else None,
        "lora": {"r": 16, "lora_alpha": 32},
        "training": {
            "max_steps": sizes.steps,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": sizes.rows,
            "gradient_accumulation_steps": 1,
            "max_length": 256,
            "activation_checkpointing": False,
            "save_steps": sizes.steps // 2,
            "seed": SEED,
        },
    }
    since = time.process_time()
    realign(recipe)
    print(f"{output.name}: {time.process_time() - since:.0f} s of training", flush=True)
    return output


def row_of(name: str, answers: dict[str, Any]) -> dict[str, Any]:
    """Return a system's figures; the difference is to the pair at λ = 0, prompt by prompt."""
    system, lam = name.split(" ")
    own, base = (answers[key]["value"] for key in (name, "pair 0"))
    numbers = range(len(own))
    tokens, before = ([float(each["tokens"]) for each in rows] for rows in (own, base))
    whole = [float(not each["truncated"]) for each in own]
    row = {
        "system": system,
        "lambda": float(lam),
        "answers": len(own),
        "tokens": list(clustered_interval(tokens, numbers, share=False)),
        "whole": list(clustered_interval(whole, numbers, share=True)),
        "less": list(paired_difference_interval(tokens, numbers, before, numbers)),
        "seconds": answers[name]["seconds"],
    }
    if system == "peer":
        pair = answers[f"pair {lam}"]["value"]
        equal = [one["text"] == other["text"] for one, other in zip(own, pair, strict=True)]
        row["equal_to_pair"] = sum(equal) / len(equal)
    return row


def section(results: dict[str, Any]) -> str:
    """Return the section of the results: the command and the table."""
    return "\n".join([*_table(results), ""])


def _table(results: dict[str, Any]) -> list[str]:
    sizes = results["sizes"]
    lines = [
        f"`python benchmarks/prompts.py --data {results['data']}`. λ = 0: the model as it is; λ = 1: "
        f"told *{SYSTEM}* {sizes['held_out']} held-out prompts, one answer each at temperature 0.7 "
        f"and top-p 0.95, cut off at {sizes['answer_tokens']} tokens; seeds are equal for all systems. "
        f"Students: LoRA of rank 16, {sizes['steps']} steps of {sizes['rows']} responses of at most "
        f"{sizes['trace_tokens']} tokens, asked without the system message. *Whole*: the share of "
        "answers that end by themselves. Brackets: 95 % intervals over prompts. Means are too low "
        "where many answers are cut off.",
        "",
        "| system | λ | tokens | against λ = 0 | whole | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        lines.append(
            f"| {row['system']} | {row['lambda']:g} | {_bracket(row['tokens'], 1)} "
            f"| {_bracket(row['less'], 1)} | {_bracket(row['whole'], 2)} | {row['seconds']:.0f} |"
        )
    return lines


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["# One model under two prompts: SmolLM2-135M", "", *_table(results)]
    equal = [row["equal_to_pair"] for row in results["rows"] if "equal_to_pair" in row]
    lines += [
        "",
        f"The plain model under each prompt (*peer*) gives the pair's answers at λ = 0 and 1 in "
        f"{equal[0]:.0%} and {equal[1]:.0%} of the prompts, word by word.",
        *(
            ["", f"Not measured yet: {', '.join(results['missing'])}."]
            if results["missing"]
            else []
        ),
        "",
        f"The first held-out prompt: {results['first_prompt']!r}",
        "",
        *(f"- *{name}*: {text!r}" for name, text in results["first"].items()),
    ]
    return "\n".join([*lines, ""])


def _bracket(interval: Sequence[float], digits: int) -> str:
    low, mean, high = interval
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    main()
