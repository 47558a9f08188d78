"""InRa's results in the miniature: the dial, the adaptive dial, and what they have to beat.

    python benchmarks/dial.py                # about 25 minutes on two cores
    python benchmarks/dial.py --quick        # a few minutes, wide intervals
    python benchmarks/dial.py --rewrite      # only write the last run's report again

Every setting answers the same questions, so differences are taken question by question. The
adaptive dial and the coin are put together from the fast mode's greedy answer and the slow mode's
sampled one to each question: both ends, every threshold and every share then meet the same luck.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RAW = Path("benchmarks/results/dial.json")
QUESTION_SEED, CHOICE_SEED, CONFIRMING_SEED = 20_000, 30_000, 40_000
"""Of the questions that all settings answer, of those that the threshold is chosen on, and of the
many that the two ends alone answer, to confirm the adaptive dial."""

LIMIT = 500
"""Tokens; one slow answer in some thousands is longer. Mixtures that lose themselves end here."""

FAST_LAMBDAS = (-0.5, 0.25, 0.5, 0.75, 1.0, 1.5)
CONCISE_LAMBDAS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
CONCISE_ANSWERED = (-1.0, -0.5, 0.5, 1.0, 1.5, 2.0)
THRESHOLDS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.42, 0.44, 0.46, 0.48, 0.5, 0.6, 0.7)
SHARES = (0.25, 0.5, 0.75)
BUDGETS = (20, 40, 60, 80, 110)
SOFT_BUDGETS = (40, 80, 160)
SOFT_ENDS = {"fast": 1.0, "concise": 1.5, "pair": 5.0}
PAIR_LAMBDAS = (-0.5, 0.5, 2.0)
CHOSEN_CUT = 0.62
"""Cut in tokens that the threshold is chosen for; the aim is 0.6 on other questions."""
CONCISE = {
    "sft": {"steps": 900, "learning_rate": 2e-3},
    "trra": {"steps": 900, "learning_rate": 2e-3},
}

Found = dict[str, Any]
"""A setting's name, its ``answers``, and the ``traces`` and ``confidence`` that others need."""


def train_concise(method: str, folder: Path, options: dict[str, Any]) -> None:
    """Train an adapter towards the aligned model, unless its folder is there already."""
    import torch

    from flexalign.cli._miniature import make_adapter
    from flexalign.evaluation.showcase import load_pair
    from flexalign.miniature import ALIGNED
    from flexalign.miniature import folder as part
    from flexalign.miniature.build import Schooling, teach

    if (folder / "inra_config.json").is_file():
        return
    torch.set_num_threads(1)
    adapter = make_adapter(part("reference"))
    recipe = {**CONCISE[method], **({"steps": 100} if options["quick"] else {})}
    if method == "sft":
        teach(adapter.stream, Schooling(ALIGNED, batch_size=24, **recipe), seed=0, callbacks=[])
    else:
        from _adapters import dial_logits, plain_logits, towards

        reference, aligned, _ = load_pair()
        student = dial_logits(adapter.model, 1.0)
        parameters = list(adapter.model.adapter.parameters())
        towards(student, parameters, plain_logits(reference), plain_logits(aligned), **recipe)
    adapter.save(folder)


def branch_table(method: str, folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Habits at each λ, teacher-forced, beside the form of the adapter's own measured ends."""
    import torch
    from _adapters import dial_logits, walked

    from flexalign.inra import InRaModel
    from flexalign.miniature import make_questions
    from flexalign.miniature.build import CONTEXT_TOKENS, build_tokenizer
    from flexalign.miniature.closed_form import expected_outcome, token_level
    from flexalign.miniature.measure import branch_probabilities, mean_habits

    torch.set_num_threads(1)
    model = InRaModel.from_pretrained("miniature:reference", folder)
    questions = make_questions(options["judged_questions"], QUESTION_SEED)
    values = branch_probabilities(
        {f"{lam:g}": dial_logits(model, lam) for lam in CONCISE_LAMBDAS},
        build_tokenizer(CONTEXT_TOKENS),
        questions,
        walked(questions),
    )
    habits = {name: mean_habits(found) for name, found in values.items()}
    rows = []
    for name, measured in habits.items():
        form = token_level(habits["0"], habits["1"], float(name))
        rows.append(
            {
                "method": method,
                "lambda": float(name),
                "habits": asdict(measured),
                "form": asdict(form),
                "form_outcome": asdict(expected_outcome(form)),
            }
        )
    return rows


def answer_fast(lam: float | None, options: dict[str, Any], seed: int) -> Found:
    """Let the fast adapter's dial answer at λ, or greedily at λ = 1 with its confidence (None)."""
    from flexalign.evaluation.ends import confidences

    model, tokenizer, questions = _dial("miniature:fast", options, seed)
    if lam is not None:
        return _answered("mixed dial", f"λ={lam:g}", model, tokenizer, questions, lam=lam)
    found = _answered(
        "fast, greedy", "greedy", model, tokenizer, questions, lam=1.0, temperature=0.0
    )
    return {**found, "confidence": confidences(model, tokenizer, questions, found["traces"])}


def answer_concise(method: str, folder: Path, lam: float, options: dict[str, Any]) -> Found:
    model, tokenizer, questions = _dial(folder, options, QUESTION_SEED)
    system = f"concise dial, {method}"
    return _answered(system, f"λ={lam:g}", model, tokenizer, questions, lam=lam)


def answer_soft(where: str, budget: int, work: Path, options: dict[str, Any]) -> Found:
    """A soft budget: λ rises from 0 over the budget's tokens of thinking, and stays there.

    Args:
        where: What the λ belongs to: the fast adapter, the concise one, or the pair.
        budget: In tokens.
        work: Holds the concise adapter.
        options: Of the run.
    """
    from flexalign import ModelPair, TwoModelDecoder

    if where == "pair":
        model: Any = TwoModelDecoder(ModelPair.load("miniature:reference", "miniature:aligned"))
        _, tokenizer, questions = _dial("miniature:fast", options, QUESTION_SEED)
    else:
        adapter = "miniature:fast" if where == "fast" else work / "sft"
        model, tokenizer, questions = _dial(adapter, options, QUESTION_SEED)
    end = SOFT_ENDS[where]
    answer = 0.0 if where == "fast" else 1.0  # the fast stream knows no answers to thinking
    schedule = {"kind": "thinking", "think": 0.0, "answer": answer, "budget": budget, "end": end}
    name = f"N={budget}, end {end:g}"
    return _answered(f"soft budget, {where}", name, model, tokenizer, questions, lam=schedule)


def answer_hard(budget: int, slow: Found, options: dict[str, Any]) -> Found:
    """A hard cut: the slow mode's thinking, stopped after so many tokens by ``</think>``."""
    from flexalign.evaluation.ends import judge
    from flexalign.evaluation.showcase import load_pair

    reference, _, tokenizer = load_pair()
    questions = _questions(options, QUESTION_SEED)
    traces = [list(trace) for trace in slow["traces"]]
    # <think> is no token of the budget; a trace that closes in time is left as it is.
    late = [i for i, trace in enumerate(traces) if "</think>" not in trace[: budget + 2]]
    kept = {i: [*traces[i][: budget + 1], "</think>"] for i in late}
    prompts = [" ".join(["<bos>", questions[i].text, *kept[i]]) for i in late]
    for i, written in zip(late, _written(reference, tokenizer, prompts), strict=True):
        traces[i] = kept[i] + written
    return {"system": "hard cut", "setting": f"N={budget}", "answers": judge(questions, traces)}


def answer_pair(kind: str, lam: float, options: dict[str, Any]) -> Found:
    """The pair by other ways: equation 5 over two models, between weights, or TrRa's student."""
    import torch

    from flexalign import ModelPair, TwoModelDecoder, interpolate
    from flexalign.evaluation.showcase import Training, load_pair, realign
    from flexalign.loading import load_model

    torch.set_num_threads(1)
    _, aligned, tokenizer = load_pair()
    questions = _questions(options, QUESTION_SEED)
    name = f"λ={lam:g}"
    if kind == "two models":
        pair = ModelPair.load("miniature:reference", "miniature:aligned")
        return _answered(kind, name, TwoModelDecoder(pair), tokenizer, questions, lam=lam)
    with TemporaryDirectory() as scratch:
        if kind == "weights":
            output = Path(scratch) / "between"
            model = load_model(interpolate("miniature:reference", "miniature:aligned", lam, output))
        else:
            training = Training(steps=20 if options["quick"] else 150)
            model = realign(aligned, lam, Path(scratch), training)
    return _answered(kind, name, model, tokenizer, questions)


def _questions(options: dict[str, Any], seed: int) -> list[Any]:
    from flexalign.miniature import make_questions

    return make_questions(options["questions"], seed)


def _dial(adapter: Any, options: dict[str, Any], seed: int) -> tuple[Any, Any, list[Any]]:
    import torch

    from flexalign.inra import InRaModel
    from flexalign.loading import load_tokenizer
    from flexalign.miniature import folder

    torch.set_num_threads(1)
    path = folder("fast") if adapter == "miniature:fast" else adapter
    model = InRaModel.from_pretrained("miniature:reference", path)
    model._has_warned = True
    return model, load_tokenizer("miniature:reference"), _questions(options, seed)


def _answered(
    system: str, setting: str, model: Any, tokenizer: Any, questions: list[Any], **options: Any
) -> Found:
    from flexalign.evaluation.ends import judge
    from flexalign.evaluation.showcase import respond

    traces = respond(
        model,
        tokenizer,
        questions,
        seed=1,
        batch_size=64,
        max_new_tokens=LIMIT,
        **options,
    )
    answers = judge(questions, traces)
    return {"system": system, "setting": setting, "answers": answers, "traces": traces}


def _written(model: Any, tokenizer: Any, prompts: list[str]) -> list[list[str]]:
    """What a model writes after prompts that end in the middle of a response."""
    from flexalign.decoding.responses import generate_responses

    responses = generate_responses(
        model, tokenizer, prompts, max_new_tokens=20, temperature=1.0, batch_size=128, seed=2
    )
    return [response.text.split() for response in responses]


def choose_threshold(fast: Found, slow: Found) -> float:
    """The threshold of best accuracy among those that cut enough tokens, on questions set apart."""
    from flexalign.evaluation.ends import adaptive

    ends = fast["answers"], slow["answers"]
    found = {tau: adaptive(*ends, fast["confidence"], tau) for tau in THRESHOLDS}
    limit = (1 - CHOSEN_CUT) * ends[1].mean_tokens
    enough = [tau for tau, one in found.items() if one.mean_tokens <= limit]
    return max(enough, key=lambda tau: found[tau].right.sum(), default=min(THRESHOLDS))


def summarise(found: Found, fast: Found, slow: Found) -> dict[str, Any]:
    """What a setting is worth: intervals, differences to the slow mode, height over the coin."""
    from flexalign.evaluation.ends import weigh

    worth = weigh(found["answers"], fast["answers"], slow["answers"])
    return {
        "system": found["system"],
        "setting": found["setting"],
        "cut": 1 - worth.tokens.mean / slow["answers"].mean_tokens,
        **{name: list(interval) for name, interval in asdict(worth).items()},
    }


def share_miscopied(found: Found, questions: Sequence[Any]) -> float:
    """The share of responses that do not add the question's own numbers, in their order."""
    wrong = 0
    for question, trace in zip(questions, found["traces"], strict=True):
        added = [trace[i + 3] for i in range(len(trace) - 3) if trace[i].startswith("#")]
        wrong += added != [str(term) for term in question.terms[1:]]
    return wrong / len(questions)


def compare_budgets(soft: list[Found], hard: list[Found]) -> list[dict[str, Any]]:
    """Each soft budget against hard cuts at equal mean tokens: a mixture of the two beside it."""
    from flexalign.evaluation.statistics import paired_difference_interval

    ordered = sorted((one["answers"] for one in hard), key=lambda one: one.mean_tokens)
    rows = []
    for one in soft:
        answers = one["answers"]
        for low, high in pairwise(ordered):
            if low.mean_tokens <= answers.mean_tokens < high.mean_tokens:
                share = (answers.mean_tokens - low.mean_tokens) / (
                    high.mean_tokens - low.mean_tokens
                )
                mixed = (1 - share) * low.right + share * high.right
                ids = range(len(mixed))
                rows.append(
                    {
                        "system": one["system"],
                        "setting": one["setting"],
                        "tokens": answers.mean_tokens,
                        "accuracy": float(answers.right.mean()),
                        "hard_accuracy": float(mixed.mean()),
                        "difference": list(
                            paired_difference_interval(answers.right, ids, mixed, ids)
                        ),
                    }
                )
    return rows


def plan(options: dict[str, Any], adapters: Path) -> dict[str, tuple[Any, ...]]:
    """Every setting to be answered at, by its file's name: a function and its arguments."""
    jobs: dict[str, tuple[Any, ...]] = {
        "slow": (answer_fast, 0.0, options, QUESTION_SEED),
        "greedy": (answer_fast, None, options, QUESTION_SEED),
        "apart slow": (answer_fast, 0.0, options, CHOICE_SEED),
        "apart greedy": (answer_fast, None, options, CHOICE_SEED),
    }
    many = options | {"questions": options["confirming_questions"]}
    jobs |= {
        "confirming slow": (answer_fast, 0.0, many, CONFIRMING_SEED),
        "confirming greedy": (answer_fast, None, many, CONFIRMING_SEED),
    }
    for kind, lams in (("two models", PAIR_LAMBDAS), ("weights", PAIR_LAMBDAS), ("TrRa", (2.0,))):
        jobs |= {f"{kind} {lam:g}": (answer_pair, kind, lam, options) for lam in lams}
    jobs |= {f"fast {lam:g}": (answer_fast, lam, options, QUESTION_SEED) for lam in FAST_LAMBDAS}
    jobs |= {
        f"concise {lam:g}": (answer_concise, "sft", adapters / "sft", lam, options)
        for lam in CONCISE_ANSWERED
    }
    jobs |= {
        f"soft {where} {n}": (answer_soft, where, n, adapters, options)
        for where in SOFT_ENDS
        for n in SOFT_BUDGETS
    }
    return jobs


def kept(file: Path, function: Any, *arguments: Any) -> Found:
    """Do a job, or take what an earlier run kept of it."""
    import numpy as np

    from flexalign.evaluation.ends import Answers

    if not file.is_file():
        found = function(*arguments)
        answers = found["answers"]
        text = json.dumps(
            found
            | {"answers": [answers.right.astype(int).tolist(), answers.tokens.tolist()]}
            | {"confidence": [float(one) for one in found.get("confidence", [])]}
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
        print(f"{file.stem} done", flush=True)
    found = json.loads(file.read_text(encoding="utf-8"))
    right, tokens = found["answers"]
    found["answers"] = Answers(np.array(right, dtype=bool), np.array(tokens))
    found["confidence"] = np.array(found["confidence"])
    return found


def measure_all(options: dict[str, Any], work: Path, workers: int) -> dict[str, Any]:
    """Run everything that `work` does not hold yet, in processes, and put it together."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        folders = {method: work / method for method in CONCISE}
        jobs = plan(options, work)
        needs_concise = [name for name in jobs if "concise" in name]
        results = {
            name: pool.submit(kept, work / f"{name}.json", *job)
            for name, job in jobs.items()
            if name not in needs_concise
        }
        trained = [pool.submit(train_concise, m, f, options) for m, f in folders.items()]
        slow = results["slow"].result()
        for n in BUDGETS:
            name = f"hard {n}"
            results[name] = pool.submit(kept, work / f"{name}.json", answer_hard, n, slow, options)
        for one in trained:
            one.result()
        results |= {
            name: pool.submit(kept, work / f"{name}.json", *jobs[name]) for name in needs_concise
        }
        tables = [pool.submit(branch_table, m, f, options) for m, f in folders.items()]
        measured = {name: one.result() for name, one in results.items()}
        branches = [row for table in tables for row in table.result()]
    return gather(measured, branches, options)


def gather(
    measured: dict[str, Found], branches: list[dict[str, Any]], options: dict[str, Any]
) -> dict[str, Any]:
    """Add the policies over the two ends, and weigh every setting."""
    from flexalign.evaluation.ends import adaptive, coin

    slow, fast = measured["slow"], measured["greedy"]
    threshold = choose_threshold(measured.pop("apart greedy"), measured.pop("apart slow"))
    more = [measured.pop(f"confirming {end}") for end in ("greedy", "slow")]
    many = more[0]["answers"], more[1]["answers"]
    confirmed = [
        {"system": way, "setting": setting, "answers": answers}
        for way, setting, answers in (
            ("λ=0, slow", "", many[1]),
            ("λ=1, greedy", "", many[0]),
            (
                "adaptive dial",
                f"τ={threshold:g}",
                adaptive(*many, more[0]["confidence"], threshold),
            ),
        )
    ]
    ends = fast["answers"], slow["answers"]
    policies = [
        ("adaptive dial", f"τ={tau:g}", adaptive(*ends, fast["confidence"], tau))
        for tau in THRESHOLDS
    ]
    policies += [("coin", f"share {share:g}", coin(*ends, share)) for share in SHARES]
    rows = list(measured.values())
    rows += [{"system": w, "setting": s, "answers": found} for w, s, found in policies]
    softs = [one for one in rows if one["system"].startswith("soft budget")]
    hards = [one for one in rows if one["system"] == "hard cut"]
    return {
        "options": options,
        "threshold": threshold,
        "branches": branches,
        "rows": sorted((summarise(one, fast, slow) for one in rows), key=lambda row: row["system"]),
        "miscopied": {
            name: share_miscopied(measured[name], _questions(options, QUESTION_SEED))
            for name in ("slow", *(f"concise {lam:g}" for lam in CONCISE_ANSWERED))
        },
        "confirmed": [summarise(one, *more) for one in confirmed],
        "budgets": compare_budgets(softs, hards),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    from _dial_report import publish, report

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200 questions, adapters untaught")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, default=Path("out/dial"), help="where finished parts are kept"
    )
    parser.add_argument("--rewrite", action="store_true", help="only write the last run's report")
    chosen = parser.parse_args(arguments)
    if chosen.rewrite:
        publish(json.loads(RAW.read_text(encoding="utf-8")))
        return
    options = {
        "quick": chosen.quick,
        "limit": LIMIT,
        "questions": 200 if chosen.quick else chosen.questions,
        "confirming_questions": 200 if chosen.quick else 3 * chosen.questions,
        "judged_questions": 50 if chosen.quick else 400,
    }
    work = chosen.work / ("quick" if chosen.quick else "full")
    results = measure_all(options, work, chosen.workers)
    if chosen.quick:
        print(report(results))
        return
    RAW.parent.mkdir(parents=True, exist_ok=True)
    RAW.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    publish(results)


if __name__ == "__main__":
    main()
