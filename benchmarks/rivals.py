"""Every dial beside every cheap rival, on the same questions of the miniature.

    python benchmarks/rivals.py              # an hour of one core; a stopped run goes on
    python benchmarks/rivals.py --quick      # minutes: few questions, nothing kept
    python benchmarks/rivals.py --rewrite    # only the table and the picture of what is stored

The rivals need no training and one stream: the thinking cut off at a budget, a bias on its end, an
early exit, the model under the prompt alone, interpolated weights with a λ for each question. The
adaptive dial, the early exit and the λ for each question are counted with the tokens of the answers
that they reject. What `lora_dial.py` has measured on the same questions
with the same seeds (two models, students, the LoRA dial, a scaled LoRA, interpolated weights) is
taken from its results.

A cell (system, setting) is stored in ``out/rivals`` as soon as it is measured.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _cells import QUESTION_SEED, store
from _lora_dial_report import RAW as LORA_DIAL
from _rivals_report import GATE, KINDS, costs, mixtures, publish, section

WORK = Path("out/rivals")
SEED = 1

BUDGETS = (16, 32, 48, 64, 96)
BIASES = (1.0, 2.0, 3.0, 4.0, 6.0)
THRESHOLDS = (0.3, 0.4, 0.5, 0.7, 0.9)
EXITS = (0.9, 0.999, 0.99999)
LADDERS = (
    ((0.5,), (1.0, 0.0)),
    ((0.2, 0.08), (2.0, 1.0, 0.0)),
    ((0.08,), (2.0, 1.0)),
    ((0.0,), (2.0, 1.0)),
)
"""Thresholds and λ of interpolated weights with a λ for each question. The last keeps every greedy first
answer at λ = 2: what the first answers have without a choice."""


_STORED = {
    "pair": "two models",
    "interpolated": "interpolated weights",
    "scaled": "scaled LoRA",
    "dial": "LoRA dial",
    "student": "student",
}
"""The methods of `lora_dial.py`, under the names of this table."""


def systems() -> Iterator[tuple[str, str, Callable[[], Any], dict[str, Any]]]:
    """All cells: the system, its setting, what opens the model, and options of its answers."""
    from flexalign import InRaModel, ModelPair, TwoModelDecoder
    from flexalign.data.logits import LogitsSettings
    from flexalign.lambdas import Adaptive, Exit, Ladder
    from flexalign.miniature import SYSTEM
    from flexalign.models.loading import load_model

    def reference() -> Any:
        return load_model("miniature:reference")

    def pair() -> Any:
        return TwoModelDecoder(ModelPair.load("miniature:reference", "miniature:aligned"))

    def adapter() -> Any:
        return InRaModel.from_pretrained("miniature", "miniature:fast")

    yield "reference", "as it is", reference, {}
    yield "aligned", "as it is", lambda: load_model("miniature:aligned"), {}
    yield "prompt alone", "system", lambda: load_model("miniature:hybrid"), {"system": SYSTEM}
    for budget in BUDGETS:
        limits = LogitsSettings(thinking_budget=budget)
        yield "hard budget", f"{budget}", reference, {"logits": limits}
    for bias in BIASES:
        limits = LogitsSettings(end_of_thinking_bias=bias)
        yield "bias on the end", f"{bias:g}", reference, {"logits": limits}
    for threshold in EXITS:
        policy = Exit(threshold, marker=";", answer_tokens=8)
        yield "early exit", f"{threshold:g}", reference, {"lam": policy}
        yield "early exit, pair", f"{threshold:g}", pair, {"lam": policy}
    for threshold in THRESHOLDS:
        yield "adaptive InRa dial", f"{threshold:g}", adapter, {"lam": Adaptive(threshold)}
    for thresholds, lambdas in LADDERS:
        ladder = Ladder(thresholds, lambdas)
        at, between = (", ".join(f"{one:g}" for one in part) for part in (thresholds, lambdas))
        yield "interpolated, λ per question", f"{at} for λ {between}", dict, {"ladder": ladder}


def answered(model: Any, questions: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Answer the questions; return accuracy and tokens with their intervals."""
    from flexalign.generation.responses import generate_responses
    from flexalign.miniature.demo import LONGEST_RESPONSE
    from flexalign.models.loading import load_tokenizer

    options = dict(options)
    if "ladder" in options:
        return _summary(questions, *_by_ladder(questions, options["ladder"]))
    system = options.pop("system", None)
    told = [] if system is None else [{"role": "system", "content": system}]
    prompts: list[Any] = [[*told, {"role": "user", "content": one.text}] for one in questions]
    if "lam" in options:
        options["lam"] = [options["lam"]] * len(prompts)
    responses = generate_responses(
        model,
        load_tokenizer("miniature:reference"),
        prompts,
        max_new_tokens=LONGEST_RESPONSE,
        temperature=1.0,
        batch_size=96,
        seed=SEED,
        **options,
    )

    # The tokens of a response have those of rejected answers.
    tokens = [float(one.tokens) for one in responses]
    return _summary(questions, [one.text for one in responses], tokens)


def _by_ladder(questions: Sequence[Any], ladder: Any) -> tuple[list[str], list[float]]:
    """Answer the questions by interpolated weights with a λ for each; return texts and tokens."""
    from flexalign.data.traces import derive_seed
    from flexalign.lambdas import Setting
    from flexalign.miniature.demo import LONGEST_RESPONSE
    from flexalign.systems import PromptRequest, SystemOptions, open_backend, parse_system

    setting = Setting.of(ladder)
    options = SystemOptions(
        temperature=1.0, top_p=1.0, max_new_tokens=LONGEST_RESPONSE, batch_size=96
    )
    requests = [
        PromptRequest(
            place, [{"role": "user", "content": one.text}], setting, 0, derive_seed(SEED, place)
        )
        for place, one in enumerate(questions)
    ]
    backend = open_backend(parse_system("interpolate:miniature"), [setting], options)
    blocks = backend.run(requests, set())
    answers = {request.prompt: answer for block in blocks for request, answer in block}
    found: list[Any] = [answers[place] for place in range(len(questions))]
    return [one.text for one in found], [float(one.tokens) for one in found]


def _summary(
    questions: Sequence[Any], texts: Sequence[str], tokens: Sequence[float]
) -> dict[str, Any]:
    """Return accuracy and tokens with their intervals."""
    from flexalign.miniature.measure import is_right, split_trace
    from flexalign.statistics import clustered_interval

    asked = range(len(questions))
    right = [
        float(is_right(question, split_trace(text)))
        for question, text in zip(questions, texts, strict=True)
    ]
    return {
        "accuracy": list(clustered_interval(right, asked)),
        "tokens": list(clustered_interval(tokens, asked, share=False)),
    }


def measure(work: Path, count: int, only: Sequence[str] = ()) -> None:
    """Measure what is missing."""
    import torch

    from flexalign.miniature import make_questions

    torch.set_num_threads(1)
    questions = make_questions(count, QUESTION_SEED)
    for name, setting, load, options in systems():
        path = work / f"{name},{setting}.json"
        if path.is_file() or (only and name not in only):
            continue
        store(path, {"system": name, "setting": setting} | answered(load(), questions, options))
        print(path.stem, flush=True)


def collected(work: Path, count: int) -> dict[str, Any]:
    """All cells, those of `lora_dial.py` on as many questions, and what others say about both."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in work.glob("*.json")]
    stored = json.loads(LORA_DIAL.read_text(encoding="utf-8"))
    if stored["options"]["questions"] == count:
        rows += [
            {
                "system": _STORED[row["method"]],
                "setting": f"{row['lambda']:g}",
                "accuracy": _in_order(row, "accuracy"),
                "tokens": _in_order(row, "tokens"),
            }
            for row in stored["rows"]
            if row["pair"] == "miniature" and row["gate"] == GATE and row["seed"] == 0
        ]
    rows.sort(key=lambda row: (list(KINDS).index(row["system"]), _place(row)))
    return {"questions": count, "rows": rows, "costs": costs(), "mixtures": mixtures(rows)}


def _in_order(row: dict[str, Any], name: str) -> list[float]:
    low, high = row[f"{name}_interval"][0], row[f"{name}_interval"][-1]
    return [low, row[name], high]


def _place(row: dict[str, Any]) -> float:
    number = re.match(r"[\d.]+", row["setting"])
    return float(number[0]) if number else 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the table of all that is stored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="50 questions, nothing kept")
    parser.add_argument("--rewrite", action="store_true", help="only write the table again")
    parser.add_argument("--systems", nargs="*", default=[], choices=list(KINDS), metavar="SYSTEM")
    chosen = parser.parse_args(arguments)
    count = 50 if chosen.quick else 5000
    work = WORK.with_name("rivals-quick") if chosen.quick else WORK
    if not chosen.rewrite:
        measure(work, count, chosen.systems)
    results = collected(work, count)
    if chosen.quick:
        print(section(results))
    else:
        publish(results)


if __name__ == "__main__":
    main()
