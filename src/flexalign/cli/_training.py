"""What the training commands share: what they show before, while and after they train."""

import math
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback

from flexalign.cli.console import console, result_console
from flexalign.data import Lengths, load_prompts, load_traces, split_tokens
from flexalign.errors import ConfigError
from flexalign.evaluation.grading import grade
from flexalign.generation.responses import generate_responses
from flexalign.lambdas import parse_dial, require_forward
from flexalign.models.names import known_name
from flexalign.statistics import clustered_interval
from flexalign.training.callbacks import Answer, Watcher
from flexalign.training.recipes import Watch

_SAMPLES = 2
_SHOWN = ("loss", "divergence", "lambda", "kl_reference", "kl_aligned")


def require_forward_training(lambdas: Sequence[Any], *, extrapolate: bool) -> None:
    """Refuse to train towards a λ below 0 unless it is meant.

    Args:
        lambdas: Numbers, or schedules in their JSON form.
        extrapolate: Whether it is meant.

    Raises:
        LambdaError: If there is one.
    """
    if not extrapolate:
        asked = [(f"λ = {lam}", parse_dial(lam)) for lam in lambdas]
        require_forward(asked, "allow it with --extrapolate")


class StepProgress(TrainerCallback):  # type: ignore[misc]
    """A bar over the steps on stderr, with the last logged figures beside it."""

    def __init__(self, name: str = "steps") -> None:
        columns = (
            TextColumn(name),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", table_column=Column()),  # alone may wrap
        )
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task(name, figures="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move it."""
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the latest figures."""
        values = {name: (logs or {}).get(name) for name in _SHOWN}
        text = "  ".join(
            f"{name} {value:.4g}" for name, value in values.items() if value is not None
        )
        if text:
            self._bar.update(self._task, figures=text)

    def close(self) -> None:
        """Take the bar off the screen's bottom line; what it showed stays."""
        self._bar.stop()


def plan_steps(arguments: Any, lengths: Lengths) -> tuple[dict[str, Any], int]:
    """Work out a run's steps, its batch and its epochs, and its longest row in tokens.

    Raises:
        ConfigError: If rows are to be packed and have no length.
    """
    batch = (
        arguments.per_device_train_batch_size
        * arguments.gradient_accumulation_steps
        * max(arguments.world_size, 1)
    )
    longest = min(lengths.longest, arguments.max_length or lengths.longest)
    rows = lengths.rows
    if getattr(arguments, "packing", False):
        if arguments.max_length is None:
            raise ConfigError(
                "training.packing fills rows up to training.max_length; give that a number."
            )
        longest = arguments.max_length
        rows = math.ceil((lengths.prompt_tokens + lengths.response_tokens) / longest)
    steps = arguments.max_steps
    if steps <= 0:
        steps = math.ceil(math.ceil(rows / batch) * arguments.num_train_epochs)
    epochs = round(steps * batch / rows, 3)
    return {"steps": steps, "effective_batch": batch, "epochs": epochs}, longest


def sample_rows(traces: Dataset, tokenizer: Any, max_length: int | None) -> list[dict[str, str]]:
    """Take the first rows as they are trained on: what is given, and what the loss counts."""
    samples = []
    for prompt, response in split_tokens(
        traces.select(range(min(_SAMPLES, len(traces)))), tokenizer
    ):
        kept = len(response) if max_length is None else max(max_length - len(prompt), 0)
        masked, trained = tokenizer.decode(prompt[:max_length]), tokenizer.decode(response[:kept])
        samples.append({"masked": masked, "trained": trained})
    return samples


def show_samples(samples: Sequence[dict[str, str]]) -> None:
    """Print such rows."""
    for number, sample in enumerate(samples, start=1):
        result_console.rule(f"sample {number}: dim is given, «bold» is trained on")
        text = Text.assemble((sample["masked"], "dim"), ("«", "green"))
        text.append(sample["trained"], "bold green").append("»", "green")
        result_console.print(text, soft_wrap=True)


def read_traces(data: str, *, skip_bad_rows: bool) -> Dataset:
    """Read training data: a path, or a known name that brings traces."""
    entry, part = known_name(data) or (None, "")
    if entry is not None and entry.traces is not None and not part:
        return Dataset.from_list(entry.traces())
    return load_traces(data, skip_bad_rows=skip_bad_rows)


def read_watched(watch: Watch) -> tuple[list[Any], list[str | None]]:
    """Read the prompts to watch, the first ones of the file, with their answers where known."""
    entry, part = known_name(watch.prompts) or (None, "")
    if entry is not None and entry.prompts is not None and not part:
        known = entry.prompts(watch.limit)
        return [row["prompt"] for row in known], [row["answer"] for row in known]

    rows = load_prompts(watch.prompts)
    rows = rows.select(range(min(watch.limit, len(rows))))
    answers = rows["answer"] if "answer" in rows.column_names else [None] * len(rows)
    return list(rows["prompt"]), list(answers)


def make_watcher(
    watch: Watch, watched: tuple[list[Any], list[str | None]], tokenizer: Any
) -> Watcher:
    """Join generator, grader and interval into the callback that measures the student."""

    def respond(model: Any, prompts: Sequence[Any]) -> Sequence[Answer]:
        return generate_responses(
            model,
            tokenizer,
            prompts,
            max_new_tokens=watch.max_new_tokens,
            temperature=watch.temperature,
            batch_size=watch.batch_size,
            use_cache=True,
        )

    def judge(answer: Answer, known: str) -> bool:
        return grade(answer.text, known, truncated=answer.truncated).correct

    def bracket(values: Sequence[float], share: bool) -> tuple[float, float, float]:
        return clustered_interval(values, range(len(values)), share=share)

    def report(row: dict[str, Any]) -> None:
        accuracy = f", accuracy {row['accuracy']:.3f}" if "accuracy" in row else ""
        console.print(
            f"step {row['step']}: {row['tokens']:.1f} tokens per answer, "
            f"{row['truncated']:.1%} truncated{accuracy}"
        )

    prompts, answers = watched
    return Watcher(
        prompts,
        answers,
        every_steps=watch.every_steps,
        respond=respond,
        judge=judge,
        bracket=bracket,
        report=report,
    )
