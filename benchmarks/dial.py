"""InRa's results in the miniature: the dial, the adaptive dial, and what they have to beat.

    python benchmarks/dial.py                # about 25 minutes on two cores
    python benchmarks/dial.py --quick        # a few minutes, wide intervals
    python benchmarks/dial.py --rewrite      # only write the last run's report again
    python benchmarks/dial.py --exits --questions 500   # early exits alone, printed

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
from typing import Any

from _dial_answers import (
    CONCISE,
    LIMIT,
    QUESTION_SEED,
    SOFT_ENDS,
    Found,
    answer_concise,
    answer_exit,
    answer_fast,
    answer_hard,
    answer_pair,
    answer_soft,
    branch_table,
    questions_of,
    train_concise,
)

RAW = Path("benchmarks/results/dial.json")
CHOICE_SEED, CONFIRMING_SEED = 30_000, 40_000
"""Of the questions that the threshold is chosen on, and of the many that the two ends alone answer,
to confirm the adaptive dial."""

FAST_LAMBDAS = (-0.5, 0.25, 0.5, 0.75, 1.0, 1.5)
CONCISE_ANSWERED = (-1.0, -0.5, 0.5, 1.0, 1.5, 2.0)
THRESHOLDS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.42, 0.44, 0.46, 0.48, 0.5, 0.6, 0.7)
SHARES = (0.25, 0.5, 0.75)
BUDGETS = (20, 40, 60, 80, 110)
SOFT_BUDGETS = (40, 80, 160)
PAIR_LAMBDAS = (-0.5, 0.5, 2.0)
EXITS = {"fast adapter": (0.5, 0.9, 0.97, 0.99), "pair": (0.95,), "one stream": (0.95,)}
"""Thresholds of early exits, by whose trial answers they are."""
CHOSEN_CUT = 0.62
"""Cut in tokens that the threshold is chosen for; the aim is 0.6 on other questions."""


def choose_threshold(fast: Found, slow: Found) -> float:
    """The threshold of best accuracy among those that cut enough tokens, on questions set apart."""
    from flexalign.miniature.demo import adaptive

    ends = fast["answers"], slow["answers"]
    found = {tau: adaptive(*ends, fast["confidence"], tau) for tau in THRESHOLDS}
    limit = (1 - CHOSEN_CUT) * ends[1].mean_tokens
    enough = [tau for tau, one in found.items() if one.mean_tokens <= limit]
    return max(enough, key=lambda tau: found[tau].right.sum(), default=min(THRESHOLDS))


def summarise(found: Found, fast: Found, slow: Found) -> dict[str, Any]:
    """What a setting is worth: intervals, differences to the slow mode, height over the coin."""
    from flexalign.miniature.demo import compare_with_ends

    worth = compare_with_ends(found["answers"], fast["answers"], slow["answers"])
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
    from flexalign.statistics import paired_difference_interval

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
    jobs |= {f"hard {n}": (answer_hard, n, options) for n in BUDGETS}
    jobs |= {f"fast {lam:g}": (answer_fast, lam, options, QUESTION_SEED) for lam in FAST_LAMBDAS}
    jobs |= exit_jobs(options)
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


def exit_jobs(options: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The early exits, as in :func:`plan`."""
    return {
        f"exit {where} {tau:g}": (answer_exit, where, tau, options)
        for where, taus in EXITS.items()
        for tau in taus
    }


def adaptive_exits(measured: dict[str, Found], threshold: float) -> list[Found]:
    """The adaptive dial with exits in its slow answers: a rejected fast answer's tokens count too."""
    from flexalign.miniature.demo import adaptive

    fast = measured["greedy"]
    return [
        {
            "system": f"adaptive, then {one['system']}",
            "setting": f"τ={threshold:g}, {one['setting']}",
            "answers": adaptive(fast["answers"], one["answers"], fast["confidence"], threshold),
        }
        for name, one in measured.items()
        if name.startswith("exit fast")
    ]


def measure_exits(options: dict[str, Any], work: Path) -> dict[str, Any]:
    """Early exits beside the adaptive dial, over the same two ends."""
    from flexalign.miniature.demo import adaptive

    jobs = {
        "slow": (answer_fast, 0.0, options, QUESTION_SEED),
        "greedy": (answer_fast, None, options, QUESTION_SEED),
    } | exit_jobs(options)
    measured = {name: kept(work / f"{name}.json", *job) for name, job in jobs.items()}
    slow, fast = measured["slow"], measured["greedy"]
    ends = fast["answers"], slow["answers"]
    threshold = 0.44  # the one that this benchmark chose on other questions
    rows = [*measured.values(), *adaptive_exits(measured, threshold)]
    rows.append(
        {
            "system": "adaptive dial",
            "setting": f"τ={threshold:g}",
            "answers": adaptive(*ends, fast["confidence"], threshold),
        }
    )
    return {"options": options, "rows": [summarise(one, fast, slow) for one in rows]}


def kept(file: Path, function: Any, *arguments: Any) -> Found:
    """Do a job, or take what an earlier run kept of it."""
    import numpy as np

    from flexalign.miniature.demo import JudgedAnswers

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
    found["answers"] = JudgedAnswers(np.array(right, dtype=bool), np.array(tokens))
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
    from flexalign.miniature.demo import adaptive, coin

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
    rows = [*measured.values(), *adaptive_exits(measured, threshold)]
    rows += [{"system": w, "setting": s, "answers": found} for w, s, found in policies]
    softs = [one for one in rows if one["system"].startswith("soft budget")]
    hards = [one for one in rows if one["system"] == "hard cut"]
    return {
        "options": options,
        "threshold": threshold,
        "branches": branches,
        "rows": sorted((summarise(one, fast, slow) for one in rows), key=lambda row: row["system"]),
        "miscopied": {
            name: share_miscopied(measured[name], questions_of(options, QUESTION_SEED))
            for name in ("slow", *(f"concise {lam:g}" for lam in CONCISE_ANSWERED))
        },
        "confirmed": [summarise(one, *more) for one in confirmed],
        "budgets": compare_budgets(softs, hards),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    from _dial_report import exit_table, publish, report

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200 questions, adapters untaught")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, default=Path("out/dial"), help="where finished parts are kept"
    )
    parser.add_argument("--rewrite", action="store_true", help="only write the last run's report")
    parser.add_argument("--exits", action="store_true", help="only early exits; print the table")
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
    if chosen.exits:
        print(exit_table(measure_exits(options, work / f"exits of {options['questions']}")))
        return
    results = measure_all(options, work, chosen.workers)
    if chosen.quick:
        print(report(results))
        return
    RAW.parent.mkdir(parents=True, exist_ok=True)
    RAW.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    publish(results)


if __name__ == "__main__":
    main()
