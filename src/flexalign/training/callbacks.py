"""Callbacks of a training run: measuring the student, timing steps, and stopping on a signal."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from flexalign._storage import write_text
from flexalign.evaluation.grading import grade
from flexalign.generation.responses import generate_responses
from flexalign.statistics import clustered_interval
from flexalign.training.checkpoints import writing
from flexalign.training.events import StepObserver
from flexalign.training.recipes import WatchSettings

# The student's answers to a few prompts: the curve of a run.

CURVE = "curve.jsonl"
"""The file of the watcher's measurements in the run's folder, one row each."""


class StudentAnswer(Protocol):
    """One answer of the student."""

    @property
    def text(self) -> str:
        """The answer, special tokens removed."""

    @property
    def tokens(self) -> int:
        """Its length in tokens, without the end-of-sequence token."""

    @property
    def truncated(self) -> bool:
        """Whether the limit on tokens cut it off."""


Respond = Callable[[Any, Sequence[Any]], Sequence[StudentAnswer]]
Judge = Callable[[StudentAnswer, str], bool]
Bracket = Callable[[Sequence[float], bool], tuple[float, float, float]]
AtLambda = Callable[[float], AbstractContextManager[None]]


class Watcher(TrainerCallback):  # type: ignore[misc]
    """Measures the student's answers to a few prompts at regular steps.

    The untrained student is measured before step 0, and the trained one after the last step. Each
    measurement is a row of ``curve.jsonl``: mean tokens, the share of truncated answers and, over
    the prompts with a known answer, the share of correct ones.

    A student whose strength is λ is measured at several λ, each a row with its `lambda`. Before
    step 0 it is the reference at every λ, and at λ = 0 it remains the reference, so the first
    measurement is at the λ nearest to 0 alone, and the later ones leave 0 out.
    """

    def __init__(
        self,
        prompts: Sequence[Any],
        known_answers: Sequence[str | None],
        *,
        every_steps: int,
        respond: Respond,
        judge: Judge,
        bracket: Bracket,
        report: Callable[[dict[str, Any]], None] = lambda row: None,
        lams: Sequence[float] = (),
        at_lambda: AtLambda = lambda lam: contextlib.nullcontext(),
    ) -> None:
        """Create the watcher; it runs when training begins.

        Args:
            prompts: Text or lists of messages.
            known_answers: One per prompt, None if it is not known.
            every_steps: Steps between two measurements.
            respond: Answers prompts with a model. It must restore the model's mode and all random
                state, so that measuring does not change the training.
            judge: Returns whether an answer agrees with the known one.
            bracket: Returns low, mean and high of values, one per prompt. Its second argument is
                whether the values are 0 or 1.
            report: Called with each row.
            lams: The λ to measure at; empty for a student of one λ.
            at_lambda: Returns a context in which the student runs at a λ.
        """
        self._lams, self._at_lambda = tuple(lams), at_lambda
        self._prompts = list(prompts)
        self._known = list(known_answers)
        self._every = every_steps
        self._respond, self._judge, self._bracket = respond, judge, bracket
        self._report = report

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Delete rows after the step that training resumes from; measure if that step is due."""
        if not state.is_world_process_zero:
            return
        curve, step = Path(args.output_dir) / CURVE, state.global_step
        rows = [row for row in read_curve(curve.parent) if row["step"] <= step]

        # The rows of a step may be incomplete, if the run was killed while they were written.
        complete = sum(row["step"] == step for row in rows) == len(self._lams_at(step))
        is_missing = self._is_due(state) and not complete
        if is_missing:
            rows = [row for row in rows if row["step"] != step]
        with writing(CURVE, curve.parent):
            write_text(curve, "".join(map(_as_line, rows)))
        if is_missing:
            self._measure(curve, step, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if the step is due, unless the run is stopping: it is then measured on resuming."""
        stopping = control.should_training_stop and state.global_step < state.max_steps
        if state.is_world_process_zero and self._is_due(state) and not stopping:
            self._measure(Path(args.output_dir) / CURVE, state.global_step, kwargs["model"])

    def _is_due(self, state: Any) -> bool:
        return bool(state.global_step % self._every == 0 or state.global_step == state.max_steps)

    def _lams_at(self, step: int) -> Sequence[float | None]:
        """Return the λ of a step's rows; None stands for the student as it is."""
        if not self._lams:
            return (None,)
        if step == 0:
            return (min(self._lams, key=abs),)
        return tuple(lam for lam in self._lams if lam != 0)

    def _measure(self, curve: Path, step: int, model: Any) -> None:
        rows: list[dict[str, Any]] = []
        for lam in self._lams_at(step):
            with contextlib.nullcontext() if lam is None else self._at_lambda(lam):
                answers = self._respond(model, self._prompts)
            named = {"step": step} if lam is None else {"step": step, "lambda": lam}
            rows.append({**named, **self._figures(answers)})

        with writing(CURVE, curve.parent), curve.open("a", encoding="utf-8") as file:
            file.write("".join(map(_as_line, rows)))
        for row in rows:
            self._report(row)

    def _figures(self, answers: Sequence[StudentAnswer]) -> dict[str, Any]:
        low, tokens, high = self._bracket([float(answer.tokens) for answer in answers], False)
        figures: dict[str, Any] = {
            "prompts": len(answers),
            "tokens": tokens,
            "tokens_ci": [low, high],
            "truncated": sum(answer.truncated for answer in answers) / len(answers),
        }
        graded = [
            float(self._judge(answer, known))
            for answer, known in zip(answers, self._known, strict=True)
            if known is not None
        ]
        if graded:
            low, accuracy, high = self._bracket(graded, True)
            figures |= {"graded": len(graded), "accuracy": accuracy, "accuracy_ci": [low, high]}
        return figures


def make_watcher(
    watch: WatchSettings,
    prompts: Sequence[Any],
    answers: Sequence[str | None],
    tokenizer: PreTrainedTokenizerBase,
    report: Callable[[dict[str, Any]], None],
    lams: Sequence[float] = (),
    at_lambda: AtLambda = lambda lam: contextlib.nullcontext(),
) -> Watcher:
    """Create the watcher that generates, grades and summarises answers as the evaluation does.

    Args:
        watch: The recipe's settings.
        prompts: Text or lists of messages.
        answers: One per prompt, None if it is not known.
        tokenizer: The student's tokenizer.
        report: Called with each row.
        lams: As in `Watcher`, as is the next.
        at_lambda: Returns a context in which the student runs at a λ.
    """

    def respond(model: Any, prompts: Sequence[Any]) -> Sequence[StudentAnswer]:
        return generate_responses(
            model,
            tokenizer,
            prompts,
            max_new_tokens=watch.max_new_tokens,
            temperature=watch.temperature,
            batch_size=watch.batch_size,
            use_cache=True,
        )

    def judge(answer: StudentAnswer, known: str) -> bool:
        return grade(answer.text, known, truncated=answer.truncated).correct

    def bracket(values: Sequence[float], share: bool) -> tuple[float, float, float]:
        return clustered_interval(values, range(len(values)), share=share)

    return Watcher(
        prompts,
        answers,
        every_steps=watch.every_steps,
        respond=respond,
        judge=judge,
        bracket=bracket,
        report=report,
        lams=lams,
        at_lambda=at_lambda,
    )


class StepRelay(TrainerCallback):  # type: ignore[misc]
    """Passes a trainer's events on to an observer."""

    def __init__(self, observer: StepObserver) -> None:
        self._observer = observer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the beginning of the training on."""
        self._observer.on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the end of a step on."""
        self._observer.on_step_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass logged figures on."""
        self._observer.on_log(args, state, control, **kwargs)


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Measures the seconds of a run's optimizer steps."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start timing a step."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop timing the step, and count it."""
        self.steps, self.seconds = self.steps + 1, self.seconds + time.perf_counter() - self._began

    @property
    def mean(self) -> float | None:
        """Seconds per step; None if no step ran, as in a run that was already done."""
        return self.seconds / self.steps if self.steps else None


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Ends training on Ctrl-C or SIGTERM, after the current step and a checkpoint.

    A second signal raises `KeyboardInterrupt` at once. The run's last step is followed by a
    checkpoint too, independent of `save_strategy`.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the two signals inside the block. Python permits this only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._request) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request a checkpoint and the end of training, on all processes in the same step."""
        if _any_process(self.requested, args.device):
            self.requested = True
            control.should_training_stop = True
        if self.requested or state.global_step >= state.max_steps:
            control.should_save = True

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: it is not reentrant, and the signal may have interrupted a print.
        os.write(2, b"\nstopping: a checkpoint is saved at the end of this step\n")


def read_curve(output: Path) -> list[dict[str, Any]]:
    """Read a run's ``curve.jsonl``; return no rows if it is missing, and skip incomplete lines."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in (output / CURVE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def _as_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _any_process(flag: bool, device: torch.device) -> bool:
    if not torch.distributed.is_initialized():
        return flag
    flags = torch.tensor([int(flag)], device=device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags.item())
