import json
import math
import random

import numpy as np
import pytest

from flexalign.errors import ConfigError, DataError
from flexalign.evaluation import summary as module
from flexalign.evaluation.summary import (
    token_cut,
    token_cut_mean,
    token_cut_pooled,
)
from flexalign.statistics import clustered_interval, token_cut_interval

KEYS = {
    *("system", "setting", "effort", "lambda", "task", "n_questions", "n_samples", "accuracy"),
    *("accuracy_ci", "tokens", "tokens_ci", "thinking_tokens", "token_cut", "token_cut_ci"),
    *("chord_distance", "chord_distance_ci", "hull_distance", "hull_distance_ci", "wrong"),
    *("truncated", "unparsed", "no_answer"),
}


def summarise(*arguments):
    """The JSON value of a summary, which is read as it was written."""
    found = module.summarise(*arguments).to_json()
    assert module.Summary.from_json(found).to_json() == found
    return found


def _row(system, lam, task, question, sample, status="correct", tokens=10, thinking=4):
    return {
        "system": system,
        "setting": "as it is" if lam is None else f"λ={lam:g}",
        "lambda": lam,
        "task": task,
        "question": question,
        "sample": sample,
        "status": status,
        "tokens": tokens,
        "thinking_tokens": thinking,
    }


def _configuration(systems, tasks, baseline=None):
    return {
        "systems": [
            {
                "name": name,
                "settings": [
                    {"id": "as it is" if lam is None else f"λ={lam:g}", "lambda": lam}
                    for lam in lams
                ],
            }
            for name, lams in systems.items()
        ],
        "tasks": [{"name": task} for task in tasks],
        "baseline": baseline,
    }


@pytest.fixture
def measured():
    rng = random.Random(0)
    rows = [
        _row(
            system,
            lam,
            task,
            f"q{question}",
            sample,
            rng.choice(["correct", "correct", "wrong", "truncated", "unparsed", "no_answer"]),
            rng.randint(1, 40) * (3 if task == "long" else 1) + int(50 * (1 - (lam or 0))),
            rng.randint(0, 9),
        )
        for system, lams in (("dial", (0.0, 0.5, 1.0)), ("student", (None,)))
        for lam in lams
        for task in ("short", "long")
        for question in range(6)
        for sample in range(3)
    ]
    systems = {"dial": (0.0, 0.5, 1.0), "student": (None,)}
    return _configuration(systems, ("short", "long"), "dial"), rows


def _of(rows, setting, task, name):
    return [row[name] for row in rows if (row["setting"], row["task"]) == (setting, task)]


def test_rows_are_what_a_naive_count_gives(measured) -> None:
    configuration, rows = measured
    summary = summarise(configuration, rows, [{"flexalign": "x"}])
    assert [(r["system"], r["setting"], r["task"]) for r in summary["rows"]] == [
        (system, setting, task)
        for system, setting in [
            *(("dial", s) for s in ("λ=0", "λ=0.5", "λ=1")),
            ("student", "as it is"),
        ]
        for task in ("short", "long")
    ]
    for row in summary["rows"]:
        assert set(row) == KEYS
        place = (row["setting"], row["task"])
        statuses, tokens = _of(rows, *place, "status"), _of(rows, *place, "tokens")
        questions = _of(rows, *place, "question")
        right = [status == "correct" for status in statuses]
        assert row["n_questions"] == 6
        assert row["n_samples"] == 18
        assert row["accuracy"] == pytest.approx(np.mean(right))
        low, _, high = clustered_interval(right, questions, share=True)
        assert row["accuracy_ci"] == pytest.approx([low, high])
        assert row["tokens"] == pytest.approx(np.mean(tokens))
        assert row["thinking_tokens"] == pytest.approx(
            np.mean(_of(rows, *place, "thinking_tokens"))
        )
        for status in ("wrong", "truncated", "unparsed", "no_answer"):
            assert row[status] == pytest.approx(statuses.count(status) / 18)
        base = ("λ=0", row["task"])
        reference = _of(rows, *base, "tokens")
        cut = token_cut_interval(tokens, questions, reference, _of(rows, *base, "question"))
        assert row["token_cut"] == pytest.approx(1 - np.mean(tokens) / np.mean(reference))
        assert row["token_cut_ci"] == pytest.approx([cut.low, cut.high])


def test_an_effort_is_told_beside_the_setting_that_it_stands_for(measured) -> None:
    configuration, rows = measured
    configuration["systems"][0]["settings"][1]["effort"] = 60.0
    summary = summarise(configuration, rows, [{}])
    for part in ("rows", "means"):
        efforts = {(row["setting"], row["effort"]) for row in summary[part]}
        assert efforts == {("λ=0", None), ("λ=0.5", 60.0), ("λ=1", None), ("as it is", None)}


def test_distances_are_to_the_line_between_the_ends(measured) -> None:
    configuration, rows = measured
    summary = summarise(configuration, rows, [{}])
    slow, middle, fast = [
        next(r for r in summary["rows"] if r["setting"] == s and r["task"] == "short")
        for s in ("λ=0", "λ=0.5", "λ=1")
    ]
    share = (middle["tokens"] - fast["tokens"]) / (slow["tokens"] - fast["tokens"])
    height = fast["accuracy"] + share * (slow["accuracy"] - fast["accuracy"])
    assert middle["chord_distance"] == pytest.approx(middle["accuracy"] - height)
    assert (
        middle["chord_distance_ci"][0] < middle["chord_distance"] < middle["chord_distance_ci"][1]
    )
    assert slow["chord_distance"] == fast["chord_distance"] == 0
    student = next(r for r in summary["rows"] if r["system"] == "student")
    assert student["chord_distance"] is None
    assert student["hull_distance"] == 0


def test_means_are_named_for_what_they_are(measured) -> None:
    configuration, rows = measured
    summary = summarise(configuration, rows, [{}])
    [fast] = [mean for mean in summary["means"] if mean["setting"] == "λ=1"]
    own = [r for r in summary["rows"] if r["setting"] == "λ=1"]
    slow = [r for r in summary["rows"] if r["setting"] == "λ=0"]
    assert fast["accuracy"] == pytest.approx(np.mean([r["accuracy"] for r in own]))
    assert fast["token_cut_mean"] == pytest.approx(np.mean([r["token_cut"] for r in own]))
    pooled = 1 - sum(r["tokens"] for r in own) / sum(r["tokens"] for r in slow)
    assert fast["token_cut_pooled"] == pytest.approx(pooled)
    assert abs(fast["token_cut_pooled"] - fast["token_cut_mean"]) > 1e-3


def test_the_order_of_rows_does_not_matter(measured) -> None:
    configuration, rows = measured
    shuffled = random.Random(1).sample(rows, len(rows))
    assert summarise(configuration, shuffled, [{}]) == summarise(configuration, rows, [{}])


def test_without_a_reference_there_is_no_cut(measured) -> None:
    configuration, rows = measured
    summary = summarise(configuration | {"baseline": None}, rows, [{}])
    student = next(r for r in summary["rows"] if r["system"] == "student")
    assert student["token_cut"] is student["token_cut_ci"] is None
    mean = next(m for m in summary["means"] if m["system"] == "student")
    assert mean["token_cut_mean"] is mean["token_cut_pooled"] is None


def test_a_hole_in_the_samples_narrows_the_comparison_alone(measured) -> None:
    configuration, rows = measured
    kept = [r for r in rows if not (r["lambda"] == 1.0 and r["question"] == "q0")]
    summary = summarise(configuration, kept, [{}])
    fast = next(r for r in summary["rows"] if r["setting"] == "λ=1")
    slow = next(r for r in summary["rows"] if r["setting"] == "λ=0")
    assert (fast["n_questions"], slow["n_questions"]) == (5, 6)
    shared = [
        r["tokens"]
        for r in kept
        if r["lambda"] == 0 and r["question"] != "q0" and r["task"] == "short"
    ]
    assert fast["token_cut"] == pytest.approx(1 - fast["tokens"] / np.mean(shared))


def test_a_single_question_says_nothing_of_others() -> None:
    configuration = _configuration({"m": (None,)}, ("t",))
    [row] = summarise(configuration, [_row("m", None, "t", "q", 0)], [{}])["rows"]
    assert row["accuracy_ci"] == [0, 1]
    assert row["tokens_ci"] == [None, None]
    json.dumps(row, allow_nan=False)


def test_unknown_thinking_stays_unknown() -> None:
    configuration = _configuration({"m": (None,)}, ("t",))
    rows = [_row("m", None, "t", q, 0, thinking=n) for q, n in (("a", 3), ("b", None))]
    [row] = summarise(configuration, rows, [{}])["rows"]
    assert row["thinking_tokens"] is None


def test_nothing_sampled_is_said() -> None:
    with pytest.raises(ConfigError, match="no sample yet"):
        summarise(_configuration({"m": (None,)}, ("t",)), [], [{}])


def test_the_environment_names_the_run_and_later_machines(measured) -> None:
    configuration, rows = measured
    environment = summarise(configuration, rows, [{"python": "3.11"}, {"python": "3.12"}])[
        "environment"
    ]
    assert environment["python"] == "3.11"
    assert environment["continued_with"] == [{"python": "3.12"}]
    assert environment["run"] == configuration


@pytest.mark.parametrize("given", [{}, {"marker": "; "}], ids=["empty line", "named"])
def test_an_exit_without_a_trial_answer_is_said_and_one_with_it_is_not(given) -> None:
    policy = {"policy": "exit", "threshold": 0.9} | given
    ids = ("exit 0.9", "exit 0.5")
    configuration = _configuration({"m": (None,)}, ("t",))
    configuration["systems"][0]["settings"] = [{"id": name, "lambda": None} for name in ids]
    rows = [
        _row("m", None, "t", question, 0) | {"setting": name, "policy": policy, "confidence": sure}
        for name, sure in (("exit 0.9", None), ("exit 0.5", 0.7))
        for question in "ab"
    ]
    rows[2]["confidence"] = None  # one trial answer in two responses is one
    [note] = summarise(configuration, rows, [{}])["environment"]["notes"]
    assert note.startswith("exit 0.9 of m had no trial answer in 2 responses")
    assert repr(given.get("marker", "\n\n")) in note


def test_settings_without_a_question_in_common_have_no_distances() -> None:
    rows = [_row("s", lam, "t", f"q{lam}", 0) for lam in (0, 1)]
    rows.append(_row("other", 0, "u", "q", 0))
    found = summarise(_configuration({"s": [0, 1], "other": [0]}, ["t", "u"]), rows, [{}])["rows"]
    assert [(row["system"], row["task"]) for row in found] == [
        ("s", "t"),
        ("s", "t"),
        ("other", "u"),
    ]
    for row in found[:2]:
        assert row["chord_distance"] is None
        assert row["hull_distance"] is None
    assert found[1]["token_cut"] is None


# Table 1 of arXiv 2506.12704: mean tokens on AIME24, AIME25, MATH-500, and the cut in percent.
REFERENCE = (12602, 12278, 4699)
TABLE_1 = {
    "λ=0.5": ((10678, 10254, 3734), 17.42),
    "DeepScaleR": ((8520, 8143, 3030), 33.86),
    "λ=1.5": ((8091, 7353, 2982), 37.48),
    "λ=2": ((7441, 6498, 2897), 42.11),
    "λ=5": ((6297, 5652, 2844), 47.83),
    "λ=10": ((6004, 5174, 2713), 50.83),
    "iter1": ((5631, 4434, 2599), 54.63),
    "iter2": ((4294, 3887, 2483), 60.48),
}


@pytest.mark.parametrize("row", TABLE_1)
def test_the_papers_cuts_are_means_over_tasks(row: str) -> None:
    tokens, printed = TABLE_1[row]
    assert 100 * token_cut_mean(tokens, REFERENCE) == pytest.approx(printed, abs=0.02)


def test_pooled_is_another_figure() -> None:
    tokens, _ = TABLE_1["iter1"]
    assert token_cut_pooled(tokens, REFERENCE) == pytest.approx(0.572, abs=5e-4)


def test_an_interval_is_of_the_ratio_of_means_by_question() -> None:
    tokens, reference = [10.0, 30.0, 20.0, 40.0], [50.0, 90.0, 60.0, 100.0]
    low, cut, high = token_cut_interval(tokens, "aabb", reference, "aabb")
    assert cut == pytest.approx(1 - 100 / 300)
    ratio = 1 / 3
    parts = [(40 - ratio * 140) / 300, (60 - ratio * 160) / 300]
    half = 12.7062 * math.sqrt(2 * sum(part**2 for part in parts))
    assert (low, high) == pytest.approx((cut - half, cut + half), rel=1e-4)


def test_the_interval_covers_although_samples_of_a_question_are_alike() -> None:
    rng = np.random.default_rng(0)
    questions = np.repeat(np.arange(60), 4).tolist()
    covered = 0
    for _ in range(1000):
        length = rng.gamma(4, 25, 60)[questions]
        share = rng.beta(3, 3, 60)[questions]
        first, second = (length * rng.gamma(9, 1 / 9, 240) for _ in range(2))
        low, _, high = token_cut_interval(first * share, questions, second, questions)
        covered += low <= 0.5 <= high
    # 0.95 ± four standard errors of 1000 repetitions, 0.0276.
    assert 0.922 <= covered / 1000 <= 0.978


def test_what_has_no_cut_is_refused() -> None:
    with pytest.raises(DataError, match="writes something"):
        token_cut(5, 0)
    with pytest.raises(DataError, match="above zero"):
        token_cut_interval([1, 2], "ab", [0, 0], "ab")
    with pytest.raises(DataError, match="one of the two only"):
        token_cut_interval([1, 2], "ab", [1, 2], "ac")
    with pytest.raises(DataError, match="one figure each"):
        token_cut_mean([1], [1, 2])
    with pytest.raises(DataError, match="one figure each"):
        token_cut_pooled([], [])
