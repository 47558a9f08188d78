"""Shared by the training commands: the help on recipes, and the display of a run."""

import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperCommand

from flexalign.cli.console import (
    console,
    note,
    print_json,
    progress_bar,
    quieten_libraries,
    result_console,
    say,
    warnings_as_notes,
)
from flexalign.errors import ConfigError
from flexalign.training.events import Events, StepObserver

if TYPE_CHECKING:
    from flexalign.models.push import Push
    from flexalign.training.plan import TrainingPlan
    from flexalign.training.recipes import RecipeKey
    from flexalign.training.run import Outcome

# Help: the keys of a recipe.

_KEYS = "RECIPE KEYS"
"""The placeholder for the keys of the recipe in a command's docstring."""

_WIDTH, _COMMENT = 77, 30


class RecipeCommand(TyperCommand):
    """A command that takes a recipe: its help lists the recipe's keys, loaded only for the help."""

    recipe: ClassVar[str]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the keys into the help, and show it."""
        from flexalign.training import recipes

        keys = recipes.describe_keys(getattr(recipes, self.recipe))
        self.help = (self.help or "").replace(_KEYS, escape("\n".join(_list_keys(keys))))
        super().format_help(ctx, formatter)


class RealignCommand(RecipeCommand):
    """A command with a recipe of ``realign``."""

    recipe = "RealignRecipe"


class AdaptCommand(RecipeCommand):
    """A command with a recipe of ``adapt``."""

    recipe = "AdaptRecipe"


class BakeCommand(RecipeCommand):
    """A command with a recipe of ``bake``."""

    recipe = "BakeRecipe"


def _list_keys(
    keys: "Iterator[RecipeKey] | Sequence[RecipeKey]", indent: str = "  "
) -> Iterator[str]:
    """Yield lines of YAML with the keys, and their descriptions as comments."""
    from flexalign.training.settings import as_yaml

    for key in keys:
        value = "" if key.section or key.example == {} else f" {as_yaml(key.example)}"
        meaning = key.description.replace("`", "").partition(" By default DEFAULT")[0]
        lines = textwrap.wrap(meaning, _WIDTH - _COMMENT - 2)
        head = f"{indent}{key.name}:{value}"
        if len(head) >= _COMMENT:
            yield head
            head = ""
        for line in lines:
            yield f"{head:<{_COMMENT}}# {line}"
            head = ""
        yield from _list_keys(key.section, indent + "  ")
        if key.name == "training":
            yield f"{indent}  max_steps: 200"
            yield f"{indent}  learning_rate: 2.0e-5"


# Running.


def command_line() -> str:
    """Return this command as one line, for the model card."""
    return shlex.join(["flexalign", *sys.argv[1:]])


@contextmanager
def training_session() -> Iterator[None]:
    """Silence other libraries; if a signal stops the run, print how to continue it.

    Raises:
        typer.Exit: With code 130, after a signal.
    """
    from flexalign.training.run import Stopped

    quieten_libraries()
    with warnings_as_notes():
        try:
            yield
        except Stopped as stop:
            say(
                f"stopped after {stop.checkpoint}; give the same command again to go on from there."
            )
            raise typer.Exit(130) from None


@contextmanager
def _saying_what_stands(recipe: Any) -> Iterator[None]:
    """If Ctrl-C ends a run at once (before its first step, or the second time), say what is there.

    Args:
        recipe: The run's recipe, or a list with one for each λ.

    Raises:
        typer.Exit: With code 130, after Ctrl-C.
    """
    from flexalign.training.checkpoints import what_stands

    try:
        yield
    except KeyboardInterrupt:
        outputs = [Path(one.output) for one in (recipe if isinstance(recipe, list) else [recipe])]
        begun = [f"in {output} {what_stands(output)}" for output in outputs if output.exists()]
        say(
            f"interrupted: {'; '.join(begun) or 'nothing is written yet'}; give the same command "
            "again to go on from there."
        )
        raise typer.Exit(130) from None


def train(
    function: Callable[..., Any],
    recipe: Any,
    *,
    dry_run: bool,
    as_json: bool,
    push: "Push | None" = None,
    table: "Callable[[TrainingPlan], dict[str, str]] | None" = None,
    **options: Any,
) -> "Outcome | None":
    """Run a recipe and show it on the terminal.

    Args:
        function: `realign`, `adapt` or `bake` of the library.
        recipe: Its recipe.
        dry_run: Only show the plan.
        as_json: Show the plan as JSON.
        push: Where the finished folder is uploaded to.
        table: Returns the rows of a plan's table; by default :func:`plan_rows`.
        **options: More arguments of the function.

    Returns:
        The outcome; None after a dry run.
    """
    from flexalign.training.plan import TrainingPlan

    with _saying_what_stands(recipe), training_session():
        result = function(
            recipe, dry_run=dry_run, events=ConsoleEvents(push), command=command_line(), **options
        )
        if not isinstance(result, TrainingPlan) and push is not None and not console.quiet:
            say(f"uploaded: {push.upload(result.output)}")
    if isinstance(result, TrainingPlan):
        show_plan(result, (table or plan_rows)(result), as_json=as_json)
        if push is not None:
            say(f"would upload {result.facts['output']} to {push.repo} at the end.")
        return None
    outcome: Outcome = result
    return outcome


def planned_push(repo: str | None, *, private: bool, recipes: int = 1) -> "Push | None":
    """Check ``--push`` and ``--private`` before anything is read; None without ``--push``.

    Raises:
        ConfigError: If an upload could not succeed, or there would be several folders.
    """
    if repo is None:
        if private:
            raise ConfigError("--private is about --push; name the repository, or leave it out.")
        return None
    if recipes > 1:
        raise ConfigError(
            f"--push {repo}: with several λ there is a model for each, and a repository holds one; "
            "leave --push out, and upload each folder with: hf upload."
        )
    from flexalign.models.push import Push

    return Push.checked(repo, private=private)


class ConsoleEvents(Events):
    """Shows a run on the terminal.

    Args:
        push: Where the finished folder is uploaded to; the repository is made before training.
    """

    def __init__(self, push: "Push | None" = None) -> None:
        self._push = push

    def say(self, line: str) -> None:
        """Print a line."""
        say(line)

    def note(self, line: str) -> None:
        """Print a note."""
        note(line)

    def caution(self, line: str) -> None:
        """Print a caution."""
        console.print(f"[yellow]caution:[/yellow] {escape(line)}", soft_wrap=True)

    def begin(self, run: Any) -> None:
        """Print that a run is finished already, or the effective λ of its rounds.

        Raises:
            ConfigError: If the repository of an upload cannot be made.
        """
        if self._push is not None and not console.quiet:
            self._push.create()
        rounds = len(run.rounds)
        if run.state == "done":
            say(f"{run.recipe.output} holds this run already, finished.")
        elif rounds > 1:
            say(f"{rounds} rounds; effective λ = λ^{rounds} = {run.effective_lambda():g}")

    def measured(self, row: dict[str, Any]) -> None:
        """Print the length and accuracy of the student's answers."""
        accuracy = f", accuracy {row['accuracy']:.3f}" if "accuracy" in row else ""
        at = f", λ = {row['lambda']:g}" if "lambda" in row else ""
        console.print(
            f"step {row['step']}{at}: {row['tokens']:.1f} tokens per answer, "
            f"{row['truncated']:.1%} truncated{accuracy}"
        )

    @contextmanager
    def training(self, name: str) -> Iterator[StepObserver]:
        """Show a bar over the steps."""
        bar = StepProgress(name)
        try:
            yield bar
        finally:
            bar.close()

    @contextmanager
    def filling(self, tokens: int) -> Iterator[Callable[[int], None]]:
        """Show a bar over a cache's tokens."""
        with progress_bar("response tokens cached", tokens) as show:
            yield show


_SHOWN = ("loss", "divergence", "divergence_high", "lambda", "kl_reference", "kl_aligned")


class StepProgress(StepObserver):
    """A bar over the steps on stderr, with the last logged figures beside it."""

    def __init__(self, name: str = "steps") -> None:
        columns = (
            TextColumn(name, markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # The figures alone may wrap.
            TextColumn("{task.fields[figures]}", markup=False, table_column=Column()),
        )
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task(name, figures="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
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
        """Stop the bar; its last state stays on the screen."""
        self._bar.stop()


# A dry run.


def show_plan(plan: "TrainingPlan", rows: Mapping[str, str], *, as_json: bool) -> None:
    """Print a plan: JSON alone, or its samples and a table.

    Args:
        plan: The plan of a run.
        rows: The values of the table, by the names of its rows.
        as_json: Print JSON.
    """
    if as_json:
        print_json(plan.to_json())
        return
    for number, sample in enumerate(plan.samples, start=1):
        result_console.rule(f"sample {number}: dim is given, «bold» is trained on")
        text = Text.assemble((sample["masked"], "dim"), ("«", "green"))
        text.append(sample["trained"], "bold green").append("»", "green")
        result_console.print(text, soft_wrap=True)
        if "aligned" in sample:
            told = Text.assemble("the aligned side's prompt: ", (sample["aligned"], "dim"))
            result_console.print(told, soft_wrap=True)

    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, escape(value))
    result_console.print(table)


def plan_rows(plan: "TrainingPlan") -> dict[str, str]:
    """Return the rows of a plan's table: all its facts, unchanged but for sizes."""
    from flexalign.models.hub import describe_sizes

    rows = {}
    for name, value in plan.facts.items():
        if name == "downloads":
            value = describe_sizes(value)
        if isinstance(value, dict):
            value = ", ".join(f"{key} {part}" for key, part in value.items())
        rows[name.replace("_", " ")] = str(value)
    return rows
