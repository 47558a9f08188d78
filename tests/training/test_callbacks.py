import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerControl

from flexalign.training.callbacks import CURVE, StopOnSignal, Watcher, read_curve


@dataclass(frozen=True)
class Response:
    text: str
    tokens: int
    truncated: bool


PROMPTS = ["1+1", "2+2", "tell me"]
KNOWN = ["2", "4", None]
RESPONSES = [Response("2", 3, False), Response("5", 5, True), Response("well", 10, False)]


def _bracket(values: Sequence[float], share: bool) -> tuple[float, float, float]:
    return (0.0 if share else min(values), sum(values) / len(values), max(values))


@pytest.fixture
def model(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model().train()


class Harness:
    """Plays the trainer's part: one state, one folder, events on demand."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.args = SimpleNamespace(output_dir=str(folder), device=torch.device("cpu"))
        self.state = SimpleNamespace(global_step=0, max_steps=5, is_world_process_zero=True)
        self.control = TrainerControl()
        self.model = model
        self.folder = folder
        self.asked: list[int] = []
        self.reported: list[dict[str, Any]] = []

    def watcher(self) -> Watcher:
        def respond(model: Any, prompts: Sequence[Any]) -> Sequence[Response]:
            assert model is self.model
            self.asked.append(self.state.global_step)
            assert list(prompts) == PROMPTS
            return RESPONSES

        return Watcher(
            PROMPTS,
            KNOWN,
            every_steps=2,
            respond=respond,
            judge=lambda answer, known: answer.text == known,
            bracket=_bracket,
            report=self.reported.append,
        )

    def fire(self, callback: Any, event: str) -> None:
        getattr(callback, event)(self.args, self.state, self.control, model=self.model)

    def steps(self, callback: Any, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.state.global_step = step
            self.fire(callback, "on_step_end")


def test_the_untrained_student_comes_first_and_the_last_step_is_measured(
    tmp_path: Path, model: PreTrainedModel
) -> None:
    harness = Harness(tmp_path, model)
    watcher = harness.watcher()
    harness.fire(watcher, "on_train_begin")
    harness.steps(watcher, 1, 5)
    assert harness.asked == [0, 2, 4, 5]
    rows = read_curve(tmp_path)
    assert rows == harness.reported
    assert rows[0] == {
        "step": 0,
        "prompts": 3,
        "tokens": 6.0,
        "tokens_ci": [3.0, 10.0],
        "truncated": 1 / 3,
        "graded": 2,
        "accuracy": 0.5,
        "accuracy_ci": [0.0, 1.0],
    }


def test_a_resumed_run_drops_what_lies_beyond_and_makes_up_what_is_missing(
    tmp_path: Path, model: PreTrainedModel
) -> None:
    harness = Harness(tmp_path, model)
    lines = [json.dumps({"step": step, "tokens": 1.0}) for step in (0, 4)]
    (tmp_path / CURVE).write_text("\n".join(lines) + '\n{"step": 5, "tok', encoding="utf-8")
    harness.state.global_step = 2
    watcher = harness.watcher()
    harness.fire(watcher, "on_train_begin")
    assert [row["step"] for row in read_curve(tmp_path)] == [0, 2]
    harness.fire(watcher, "on_train_begin")
    assert harness.asked == [2]


def test_a_dial_is_measured_at_each_lambda_but_at_0_once(
    tmp_path: Path, model: PreTrainedModel
) -> None:
    at: list[float] = []
    asked: list[float] = []

    @contextlib.contextmanager
    def at_lambda(lam: float) -> Iterator[None]:
        at.append(lam)
        yield
        at.pop()

    def respond(model: Any, prompts: Sequence[Any]) -> Sequence[Response]:
        asked.append(*at)
        return RESPONSES

    harness = Harness(tmp_path, model)
    watcher = Watcher(
        PROMPTS,
        KNOWN,
        every_steps=2,
        respond=respond,
        judge=lambda answer, known: answer.text == known,
        bracket=_bracket,
        lams=(0.0, 1.0, 5.0),
        at_lambda=at_lambda,
    )
    harness.fire(watcher, "on_train_begin")
    harness.steps(watcher, 1, 2)
    assert asked == [0.0, 1.0, 5.0]
    rows = read_curve(tmp_path)
    assert [(row["step"], row["lambda"]) for row in rows] == [(0, 0.0), (2, 1.0), (2, 5.0)]

    # A step whose rows are incomplete is measured again as a whole.
    (tmp_path / CURVE).write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    harness.fire(watcher, "on_train_begin")
    assert read_curve(tmp_path) == rows
    harness.fire(watcher, "on_train_begin")
    assert asked == [0.0, 1.0, 5.0, 1.0, 5.0]


def test_without_known_answers_there_is_no_accuracy(tmp_path: Path, model: PreTrainedModel) -> None:
    harness = Harness(tmp_path, model)
    watcher = Watcher(
        PROMPTS,
        [None] * 3,
        every_steps=1,
        respond=lambda model, prompts: RESPONSES,
        judge=lambda answer, known: True,
        bracket=_bracket,
    )
    harness.fire(watcher, "on_train_begin")
    assert set(read_curve(tmp_path)[0]) == {"step", "prompts", "tokens", "tokens_ci", "truncated"}


def test_a_signal_ends_the_step_with_a_checkpoint(tmp_path: Path, model: PreTrainedModel) -> None:
    harness, stop = Harness(tmp_path, model), StopOnSignal()
    before = signal.getsignal(signal.SIGINT)
    with stop.listening():
        harness.steps(stop, 1, 1)
        assert not harness.control.should_training_stop
        os.kill(os.getpid(), signal.SIGTERM)
        harness.steps(stop, 2, 2)
        assert harness.control.should_training_stop
        assert harness.control.should_save
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_stops_is_not_measured_until_it_goes_on(
    tmp_path: Path, model: PreTrainedModel
) -> None:
    harness = Harness(tmp_path, model)
    watcher = harness.watcher()
    harness.control.should_training_stop = True
    harness.steps(watcher, 2, 2)
    assert harness.asked == []
    harness.fire(watcher, "on_train_begin")
    assert harness.asked == [2]


def test_the_last_step_is_saved_whatever_the_strategy(
    tmp_path: Path, model: PreTrainedModel
) -> None:
    harness, stop = Harness(tmp_path, model), StopOnSignal()
    harness.steps(stop, 1, 4)
    assert not harness.control.should_save
    harness.steps(stop, 5, 5)
    assert harness.control.should_save
    assert not harness.control.should_training_stop


def test_elsewhere_than_in_the_main_thread_signals_stay_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def listen() -> None:
        with StopOnSignal().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


def test_one_process_of_several_keeps_the_curve(tmp_path: Path, model: PreTrainedModel) -> None:
    harness = Harness(tmp_path, model)
    harness.state.is_world_process_zero = False
    harness.fire(harness.watcher(), "on_train_begin")
    assert harness.asked == []
    assert not (tmp_path / CURVE).exists()
