"""Whether a dial is worth a scale: whether it saves tokens at all, and at what loss of accuracy."""

from collections.abc import Mapping
from typing import Any

from flexalign.calibration.effort import REFERENCE_EFFORT
from flexalign.calibration.figures import Answers
from flexalign.errors import ConfigError
from flexalign.evaluation.statistics import simultaneous_confidence
from flexalign.evaluation.token_cut import token_cut_interval

__all__ = ["describe_loss", "require_saving"]


def require_saving(faster: Mapping[str, Answers], reference: Answers, remedy: str) -> None:
    """Refuse a dial of which no measured setting saves tokens beyond chance.

    Args:
        faster: Answers at every setting that efforts below 100 rest on, by id.
        reference: Answers of λ = 0.
        remedy: What to do about it.

    Raises:
        ConfigError: If no token cut, of 95 % intervals that hold together, is above 0.
    """
    level = simultaneous_confidence(len(faster))
    cuts = {
        name: token_cut_interval(
            own.tokens, own.questions, reference.tokens, reference.questions, level
        )
        for name, own in faster.items()
    }
    if any(cut.low > 0 for cut in cuts.values()):
        return
    name, cut = max(cuts.items(), key=lambda item: item[1].mean)
    raise ConfigError(
        f"no setting of this dial saves tokens beyond chance: {name} cuts most, "
        f"{100 * cut.mean:.1f} % [{100 * cut.low:.1f}, {100 * cut.high:.1f}] of λ = 0's tokens on "
        f"{len(set(reference.questions))} questions, so that there is no effort to set; {remedy}, "
        "or, if you expect more of it, ask more questions."
    )


def describe_loss(calibration: Mapping[str, Any]) -> str | None:
    """Say that every effort below 100 loses more accuracy than the margin allows.

    Each of the shown levels that is another setting than λ = 0 has to: its whole interval, paired
    with λ = 0 by question. As all of them must, none of the intervals needs to be wider.

    Args:
        calibration: With its `levels` and `margin`.

    Returns:
        One sentence on the level that loses least; None if there is one that may do.
    """
    margin = calibration["margin"]
    steps = [
        level
        for level in calibration["levels"]
        if level["effort"] < REFERENCE_EFFORT and level["setting"] != "λ=0"
    ]
    if not steps or any(level["accuracy_change_ci"][1] >= -margin for level in steps):
        return None
    best = max(steps, key=lambda level: level["accuracy_change"])
    low, high = best["accuracy_change_ci"]
    return (
        f"every effort below {REFERENCE_EFFORT:g} is less accurate than λ = 0 by more than the "
        f"margin of {100 * margin:g} points; effort {best['effort']:g} loses least, "
        f"{-100 * best['accuracy_change']:.1f} points [{-100 * high:.1f}, {-100 * low:.1f}]: train "
        "the adapter further or on better answers before you use this dial, or accept the loss "
        "with a larger --margin."
    )
