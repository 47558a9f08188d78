"""The bar over the steps of a training run."""

import io
from types import SimpleNamespace

from rich.console import Console

from flexalign.cli import training


def test_a_narrow_screen_shows_steps_and_figures(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        training, "console", Console(file=screen, width=80, force_terminal=True, color_system=None)
    )
    bar = training.StepProgress()
    state = SimpleNamespace(is_world_process_zero=True, max_steps=60, global_step=20)
    bar.on_train_begin(None, state, None)
    figures = ("loss", "divergence", "lambda", "kl_reference", "kl_aligned")
    bar.on_log(None, state, None, dict.fromkeys(figures, 0.0123))
    bar.on_step_end(None, state, None)
    bar.close()

    last = " ".join(screen.getvalue().rpartition("steps")[2].split())
    assert "20/60" in last
    assert all(f"{name} 0.0123" in last for name in figures)
