"""A plot of the differences between equation 5 and the sequence-level optimum it approximates."""

from pathlib import Path

import numpy as np

from flexalign.errors import ConfigError
from flexalign.miniature.closed_form import (
    expected_outcome,
    sequence_level,
    sequence_level_outcome,
    token_level,
)
from flexalign.miniature.world import ALIGNED, REFERENCE


def draw_forms(path: Path, lowest: float = -1.5, highest: float = 10.0) -> None:
    """Draw `again`, mean tokens and accuracy against λ under both closed forms.

    Args:
        path: The file to write; its suffix sets the format.
        lowest: The least λ.
        highest: The largest λ.
    """
    from matplotlib.figure import Figure

    lams = np.linspace(lowest, highest, 400)
    token, sequence = [], []
    for lam in lams:
        habits = token_level(REFERENCE, ALIGNED, lam)
        outcome = expected_outcome(habits)
        token.append((habits.again, outcome.tokens, outcome.accuracy))
        try:
            again = sequence_level(REFERENCE, ALIGNED, lam)[0].again
            outcome = sequence_level_outcome(REFERENCE, ALIGNED, lam)
            sequence.append((again, outcome.tokens, outcome.accuracy))
        except ConfigError:
            sequence.append((np.nan, np.nan, np.nan))

    figure = Figure(figsize=(11, 3.6), dpi=150, layout="constrained")
    titles = ("share of passes followed by another, r", "mean tokens a response", "accuracy")
    for column, (axes, title) in enumerate(zip(figure.subplots(1, 3), titles, strict=True)):
        axes.plot(lams, [row[column] for row in token], label="token level (equation 5)")
        axes.plot(lams, [row[column] for row in sequence], "--", label="sequence level (optimum)")
        for end in (0, 1):
            axes.axvline(end, color="#cbd5e0", linewidth=1, zorder=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("λ")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[1].set_ylim(0, 130)
    figure.axes[0].legend(frameon=False, fontsize=8)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
