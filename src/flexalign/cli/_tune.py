"""What ``flexalign tune`` needs beside the tuning: candidates, the sweep behind it, the plan."""

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexalign.cli.console import note, print_json, result_console
from flexalign.cli.options import read_settings
from flexalign.errors import ConfigError

if TYPE_CHECKING:
    from flexalign.calibration import Goal, Plan, TuneOptions, VarianceModel
    from flexalign.calibration.results import StoredAnswers
    from flexalign.evaluation.sweep import Sweep
    from flexalign.evaluation.tasks import Task
    from flexalign.lambdas import Dial, Setting
    from flexalign.systems import System


def settings_of(lambdas: "Sequence[Dial]", policies: list[str]) -> "list[Setting]":
    """Read the candidates; λ = 0, which they are compared with, goes first."""
    from flexalign.lambdas import Setting

    reference = Setting.of(0.0)
    candidates = [given for given in read_settings(lambdas, policies) if given != reference]
    return [reference, *candidates]


def sweep_of(
    system: "System",
    task: "Task",
    settings: "list[Setting]",
    options: "TuneOptions",
    given: dict[str, object],
) -> "Sweep":
    from flexalign.evaluation.sweep import Sweep
    from flexalign.systems import SystemOptions

    if system.kind == "model":
        raise ConfigError(f"{system.name} has no dial to tune; give dial:, pair: or interpolate:.")
    own = task.sampling
    defaults = {
        "temperature": own.temperature,
        "top_p": own.top_p,
        "max_new_tokens": own.max_new_tokens,
    }
    chosen = defaults | {name: value for name, value in given.items() if value is not None}
    how = SystemOptions(**chosen)  # type: ignore[arg-type]
    return Sweep([system], [task], settings, options.samples, options.seed, options=how)


def variance_of(
    answers: "StoredAnswers | None", task: str, accuracy: float | None
) -> "VarianceModel":
    """From stored answers where there are some: of the setting that differs most from λ = 0."""
    from flexalign.calibration import VarianceModel
    from flexalign.calibration.power import expected_accuracy

    if answers is None or accuracy is not None:
        return VarianceModel.assumed(expected_accuracy(task) if accuracy is None else accuracy)
    others = [setting for setting in answers.settings if setting != "λ=0"]
    if not others or "λ=0" not in answers.settings:
        raise ConfigError("the stored samples need λ=0 and a candidate; sweep both.")
    reference, *measured = [
        answers.ask(setting, answers.questions, answers.samples) for setting in ["λ=0", *others]
    ]
    models = [VarianceModel.measured(candidate, reference) for candidate in measured]
    return max(models, key=lambda model: model.of_question(answers.samples))


def plan_of(
    questions: int, options: "TuneOptions", power: float, variance: "VarianceModel"
) -> "Plan":
    from flexalign.calibration import plan

    return plan(
        questions,
        options.samples,
        confidence=options.confidence,
        power=power,
        variance=variance,
        choosing_share=options.choosing_share,
    )


def warn_of_margin(planned: "Plan", goal: "Goal") -> None:
    margin = _margin_of(goal)
    if margin is not None and not _is_proved(planned, margin):
        note(
            f"a margin of {100 * margin:g} points will often not be proved by "
            "these questions, even of an equal setting (--plan says what would be)."
        )


def _margin_of(goal: "Goal") -> float | None:
    from flexalign.calibration import NonInferiority

    return goal.margin if isinstance(goal, NonInferiority) else None


def _is_proved(planned: "Plan", margin: float) -> bool:
    """Whether `tune` mostly proves a margin of a setting that is as good as the reference."""
    return planned.tune_margin is not None and margin >= planned.tune_margin


def next_step(system: "System | None", chosen: "Setting | None") -> str | None:
    """Say what to do with what came out; None if that is the reader's own affair.

    Args:
        system: What was tuned; None if its answers were taken from a folder.
        chosen: The setting; None if none was promised.
    """
    if chosen is None:
        return "more questions, more --samples or a wider --margin; --plan says what would do"
    if system is None or system.kind not in ("dial", "pair"):
        return None
    if system.kind == "pair" and chosen.lam is not None:
        return f"flexalign realign recipe.yaml --lambda {chosen.lam:g}, for one model that does it"
    second = "--adapter" if system.kind == "dial" else "--aligned"
    turned = ["--policy", json.dumps(chosen.policy)]
    if chosen.lam is not None:
        turned = ["--lambda", f"{chosen.lam:g}"]
    words = ["flexalign", "generate", system.parts[0], second, system.parts[1], *turned]
    return shlex.join(words)


def show_plan(planned: "Plan", goal: "Goal", as_json: bool) -> None:
    margin = _margin_of(goal)
    is_proved = None if margin is None else _is_proved(planned, margin)
    if as_json:
        print_json({**planned.to_json(), "asked_margin": margin, "is_proved": is_proved})
        return

    def show(text: str) -> None:
        result_console.print(text, soft_wrap=True)

    show(
        f"{planned.questions} questions × {planned.samples} samples prove a margin of "
        f"{100 * planned.margin:.1f} points for one setting named beforehand "
        f"(confidence {100 * planned.confidence:g} %, power {100 * planned.power:g} %)."
    )
    if planned.tune_margin is not None:
        show(
            f"tune, which chooses on a part, proves on the rest and reckons with rare whole losses: "
            f"{100 * planned.tune_margin:.1f} points."
        )
    if margin is not None:
        able = "will" if is_proved else "will not"
        show(
            f"Your margin, {100 * margin:g} points: tune {able} mostly prove it of a setting that is as "
            "good as the reference."
        )
    show(
        f"Assumed variance of a question's paired difference: {planned.variance.between:.4f} "
        f"between questions, {planned.variance.within:.4f} within, divided by the samples."
    )
    for cost in planned.costs:
        questions = f"{cost.questions} questions" if cost.questions else "more than 10⁷ questions"
        samples = (
            f"{cost.samples} samples of each question"
            if cost.samples
            else "no number of samples of these questions"
        )
        show(f"  {100 * cost.margin:.1f} points: {questions}, or {samples}")
