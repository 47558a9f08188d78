"""The cards of a tuning (the promise, its evidence and its cost) and of a calibrated dial."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexalign._storage import write_json, write_text
from flexalign.calibration.effort import Calibration, show_effort
from flexalign.calibration.verify import Evidence, Proof
from flexalign.lambdas import LAMBDA_LEGEND
from flexalign.statistics import Interval
from flexalign.training.card import table

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from flexalign.calibration.tune import Tuned

CARD, RESULT, PICTURE = "tuned.md", "tuned.json", "tuned.png"


def write_card(tuned: "Tuned", output: Path, context: Mapping[str, Any]) -> None:
    """Write tuned.md, tuned.json and tuned.png into a folder.

    Args:
        tuned: The result of the tuning.
        output: The folder; created if it does not exist.
        context: Further facts about the promise, such as system, task and hashes; written into
            both files with its keys.
    """
    output.mkdir(parents=True, exist_ok=True)
    result = {**context, **tuned.to_json()}
    write_json(output / RESULT, result)
    write_text(output / CARD, render_card(tuned, context))
    draw_path(tuned, output / PICTURE)


def render_card(tuned: "Tuned", context: Mapping[str, Any]) -> str:
    """Return the card as Markdown; arguments as for :func:`write_card`."""
    confidence = f"{100 * tuned.options.confidence:g} %"
    if tuned.chosen is None:
        answer = f"**None of the candidates is promised to keep it**: {tuned.reason}."
    else:
        proof = tuned.at_proof[tuned.chosen]
        answer = (
            f"**{tuned.chosen}**: {tuned.constraint.text}, at {confidence} confidence "
            f"({tuned.reason}). On the held-out questions it takes {proof.tokens.mean:.0f} tokens "
            f"an answer instead of {proof.reference_tokens.mean:.0f} "
            f"({100 * proof.token_cut:.1f} % fewer)."
        )

    sections = [
        "# The setting that was chosen",
        answer,
        "".join(f"- {name}: {_plain(value)}\n" for name, value in context.items()).rstrip(),
        "## What is promised",
        f"{tuned.constraint.text[0].upper()}{tuned.constraint.text[1:]} ({tuned.reference}), for questions "
        f"drawn as these {len(tuned.race.questions) + len(tuned.held_out)} were. By this way of "
        "choosing, a promise is made that is not kept with probability at most "
        f"{100 * (1 - tuned.options.confidence):g} %, however many candidates there were.",
        "## Evidence when it was chosen",
        f"On at most {len(tuned.race.questions)} questions, {tuned.options.samples} samples "
        "each. A setting that was chosen for these figures is flattered by them; nothing is "
        "promised on them. *Chance*: the probability, judged here, that the held-out questions "
        f"prove it. {LAMBDA_LEGEND}.",
        table(
            ("setting", "chance", *_HEADER),
            [
                (s.setting, f"{s.promise:.0%}", *_cells(tuned.at_choice[s.setting]))
                for s in tuned.race.standings
            ],
        ),
        "## Evidence on held-out questions",
        _proof_text(tuned),
        "## What it cost",
        f"{tuned.samples} samples, {tuned.samples / tuned.exhaustive:.0%} of the "
        f"{tuned.exhaustive} that every setting on every question would have taken: "
        + ", ".join(f"{setting} {count}" for setting, count in tuned.spent.items())
        + ".",
        f"![the path]({PICTURE})",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def draw_path(tuned: "Tuned", path: Path) -> None:
    """Draw the estimate and the bound of each finalist at each look.

    Without a finalist, the candidates' chances of a proof are drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, proof in enumerate(tuned.proofs):
        questions = [look.questions for look in proof.looks]
        colour = f"C{number}"
        axes.plot(
            questions,
            [look.slack for look in proof.looks],
            "o-",
            color=colour,
            label=f"{proof.setting}: estimate",
        )
        if proof.looks[-1].threshold == 0:
            axes.plot(
                questions,
                [look.strength for look in proof.looks],
                "v:",
                color=colour,
                label=f"{proof.setting}: bound ({proof.verdict})",
            )

    if tuned.proofs:
        axes.set_xlabel("held-out questions")
    else:
        standings = tuned.race.standings
        axes.bar([s.setting for s in standings], [s.promise for s in standings], color="#a0aec0")
        axes.set_xlabel("candidate")

    axes.axhline(0, color="#4a5568", linewidth=1)
    axes.set_ylabel("room above the promise" if tuned.proofs else "chance of a proof")
    axes.set_title(f"{tuned.chosen or 'none'}: {tuned.reason}", fontsize=10, wrap=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if tuned.proofs:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


_HEADER = ("questions", "accuracy", "reference", "difference", "tokens", "reference", "cut")


def _proof_text(tuned: "Tuned") -> str:
    if not tuned.proofs:
        return "None was asked: no candidate gave hope of a proof."
    rows = [
        (proof.setting, proof.verdict, *_cells(tuned.at_proof[proof.setting]))
        for proof in tuned.proofs
    ]
    looks = "\n".join(f"- {_looks(proof)}" for proof in tuned.proofs)
    return (
        "Questions that had no part in the choice, asked in looks until the promise was proved or "
        f"given up; error shared among looks: {tuned.options.looks}. Finalists in the order set "
        "beforehand; the first that is not kept ends it. Intervals are at 95 %, as if the number "
        "of questions had been fixed.\n\n"
        + table(("setting", "verdict", *_HEADER), rows)
        + "\n\n"
        + looks
    )


def _looks(proof: Proof) -> str:
    last = proof.looks[-1]
    held = (
        f"lower bound {last.strength:+.4g} (kept above 0)"
        if last.threshold == 0
        else f"wealth {last.strength:.3g} (kept above {last.threshold:.3g})"
    )
    return (
        f"{proof.setting}: after {len(proof.looks)} looks, room above the promise "
        f"{last.slack:+.4g}, {held}."
    )


def _cells(row: Evidence) -> tuple[str, ...]:
    return (
        str(row.questions),
        _share(row.accuracy),
        f"{row.reference_accuracy.mean:.3f}",
        f"{row.difference.mean:+.3f} [{row.difference.low:+.3f}, {row.difference.high:+.3f}]",
        f"{row.tokens.mean:.0f}",
        f"{row.reference_tokens.mean:.0f}",
        f"{row.token_cut:.1%}",
    )


def _share(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# The card of a calibrated dial: what training wrote, and the curve that was measured since.

_CALIBRATED = "## Calibrated"


def add_calibration(folder: Path, calibration: Calibration) -> bool:
    """Write a calibration's curve into a dial's card, in place of an earlier calibration's.

    Each effort's accuracy and tokens become results of ``model-index``, and a table in the text.

    Args:
        folder: The dial's folder.
        calibration: Its calibration.

    Returns:
        Whether the folder has a card; without one nothing is written.
    """
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        return False

    card = ModelCard.load(path)
    others = [
        one for one in card.data.eval_results or [] if "effort" not in (one.metric_args or {})
    ]
    card.data.model_name = card.data.model_name or folder.resolve().name
    card.data.eval_results = [*others, *_effort_results(calibration)]
    # An earlier calibration's section ends at the next heading.
    before, found, after = card.text.partition(f"{_CALIBRATED}\n")
    rest = "\n## " + after.partition("\n## ")[2] if found and "\n## " in after else ""
    card.text = f"{before.rstrip()}\n{rest}".rstrip() + f"\n\n{_calibrated(calibration)}\n"

    write_text(path, str(card))
    return True


def _effort_results(calibration: Calibration) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=calibration.task,
            dataset_name=f"{calibration.task}, {calibration.questions} questions",
            metric_type=key,
            metric_value=value,
            metric_name=f"{meaning} at effort {show_effort(level.effort)} ({level.setting})",
            metric_args={"effort": level.effort},
        )
        for level in calibration.levels
        for key, meaning, value in (
            ("accuracy", "accuracy", level.metrics.accuracy.mean),
            ("tokens", "tokens per answer", level.metrics.tokens.mean),
        )
    ]


def _calibrated(calibration: Calibration) -> str:
    """Return the section, whose table has a row for each effort."""
    rows = [
        (
            show_effort(level.effort),
            level.setting,
            f"{level.metrics.tokens.mean:.1f}",
            f"{level.metrics.tokens_p10:.0f} to {level.metrics.tokens_p90:.0f}",
            f"{level.metrics.accuracy.mean:.3f} "
            f"[{level.metrics.accuracy.low:.3f}, {level.metrics.accuracy.high:.3f}]",
        )
        for level in calibration.levels
    ]
    return "\n\n".join(
        [
            _CALIBRATED,
            f"On {calibration.questions} questions of {calibration.task}, with flexalign "
            f"{calibration.made_by}; sampling: {json.dumps(dict(calibration.sampling))}.",
            table(("effort", "setting", "tokens per answer", "10 to 90 %", "accuracy"), rows),
        ]
    )
