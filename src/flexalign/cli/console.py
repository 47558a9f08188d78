"""Shared by all commands: the output streams, JSON, progress, and the display of answers."""

import codecs
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flexalign.errors import ConfigError, DataError
from flexalign.errors import as_input_errors as as_input_errors
from flexalign.lambdas import Adaptive, Exit, Setting

if TYPE_CHECKING:
    from flexalign.data.thinking import ThinkingTags
    from flexalign.evaluation.tasks import Task
    from flexalign.generation.text import Piece
    from flexalign.systems import Answer

# Rich replaces `:smile:` even in text that is printed without markup; ours is a user's or a model's.
console = Console(stderr=True, highlight=False, emoji=False)
"""Messages for people go to stderr; only the result goes to stdout."""

result_console = Console(highlight=False, emoji=False)
"""The result of a command, when it is not JSON."""


_SPELLED = {
    **{"λ": "lambda", "τ": "tau", "α": "alpha", "β": "beta", "ε": "epsilon", "κ": "kappa"},
    **{"−": "-", "–": "-", "—": "-", "·": "-", "×": "x", "±": "+-", "→": "->", "…": "..."},
    **{"≥": ">=", "≤": "<=", "≠": "!=", "≈": "~", "‖": "||", "«": "<<", "»": ">>"},
    **{"’": "'", "“": '"', "”": '"', "›": ">", "∞": "infinity", "÷": "/"},
    **{"²": "^2", "⁷": "^7", "ⁿ": "^n"},
}
"""What stands for a character of our texts where the output cannot show it."""


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding cannot show: by its spelling, or by a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unshown = error.object[error.start : error.end]
    return "".join(_SPELLED.get(character, "?") for character in unshown), error.end


def show_in_any_encoding() -> None:
    """Make the output streams replace characters that their encoding cannot show.

    Otherwise a λ in a pipe of ASCII or Latin-1 ends a command with a traceback, perhaps after hours
    of work.
    """
    codecs.register_error("flexalign", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="flexalign")


@contextmanager
def reading_input() -> Iterator[None]:
    """Report text on standard input that is not of its encoding.

    Raises:
        DataError: If it is not.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is read as {error.encoding}, and byte {error.start} of it is none; "
            "set PYTHONIOENCODING to its encoding, such as utf-8."
        ) from None


def say(line: str) -> None:
    """Print a line for people, without markup."""
    console.print(escape(line), soft_wrap=True)


def note(text: str) -> None:
    """Print a note that people may want to act on."""
    console.print(f"[yellow]note:[/yellow] {escape(text)}", soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout; what its encoding cannot show is escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)


def say_instruction(instruction: str | None, tasks: "Sequence[Task]") -> None:
    """Print the instruction after each question if it is the task's default: answers depend on it.

    A note follows for each task whose known answers are words that nothing asks to put in a box.
    """
    from flexalign.evaluation.tasks import words_warning

    texts = {task.instruction for task in tasks if task.instruction}
    if instruction is None:
        for text in sorted(texts):
            console.print(
                f"each question is followed by: {text} (--instruction '' leaves it out)",
                markup=False,
                soft_wrap=True,
            )
    for warning in filter(None, map(words_warning, tasks)):
        note(warning)


@contextmanager
def progress_bar(label: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar, in place of those of libraries; yield a function that sets the complete items."""
    quieten_libraries()
    columns = (
        TextColumn(label, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total, completed=done)
        yield lambda completed: progress.update(task, completed=completed)


@contextmanager
def resumable(*, is_kept: bool = True) -> Iterator[None]:
    """On Ctrl-C, print how to continue a run, if its output is kept."""
    try:
        yield
    except KeyboardInterrupt:
        if is_kept:
            console.print("What is written is whole; give the same command again to go on.")
        raise


@contextmanager
def resumable_bar(
    label: str, total: int, *, is_kept: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show the bar of a :func:`resumable` run; yield a function that adds complete items."""
    complete = 0

    def advance(more: int) -> None:
        nonlocal complete
        complete += more
        show(complete)

    with resumable(is_kept=is_kept), progress_bar(label, total) as show:
        yield advance


@contextmanager
def without_downloads(*, dry_run: bool) -> Iterator[None]:
    """In a dry run, leave weights at the hub, and say at the end what would be downloaded."""
    if not dry_run:
        yield
        return
    from flexalign.models.hub import downloads_wait

    with downloads_wait() as waiting:
        yield
    if waiting.sizes:
        say(f"would download {waiting.text} from the hub.")


# Messages of libraries.


def hide_library_warnings() -> None:
    """Hide what libraries tell the developers who call them: a user cannot act on it.

    ``python -W`` and ``PYTHONWARNINGS`` still show it, and ``TRANSFORMERS_VERBOSITY`` the log of
    transformers.
    """
    # At the end of the list: every other filter goes before it.
    warnings.simplefilter("ignore", FutureWarning, append=True)
    # Read when transformers is imported, which a command does when it needs it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def quieten_libraries() -> None:
    """Turn off other libraries' messages and progress bars."""
    import datasets
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Its bar heeds none of these. It is looked up in its module, so it can be replaced there.
    gguf: Any = modeling_gguf_pytorch_utils
    if not isinstance(gguf.tqdm, partial):
        gguf.tqdm = partial(gguf.tqdm, disable=True)
    # Of several processes (torchrun, accelerate launch), only the first one prints.
    console.quiet = os.environ.get("RANK", "0") != "0"


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print each UserWarning once, as a line on stderr, and drop warnings for developers."""
    told: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        text = str(message)
        if category is UserWarning and text not in told:
            told.add(text)
            note(text)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield


# Responses on the terminal: the thinking is dimmed.


class ResponsePrinter:
    """Prints one response, as a whole or while it is written."""

    def __init__(self, tags: "ThinkingTags") -> None:
        self._tags = tags
        self._is_thinking = self._has_printed = False

    def write(self, pieces: "Iterable[Piece]") -> None:
        """Print the next pieces."""
        for text, is_thinking in pieces:
            if is_thinking and not self._is_thinking:
                self._print(self._tags.open, is_dim=True)
            if self._is_thinking and not is_thinking:
                self._print(self._tags.close, is_dim=True)
            self._is_thinking = is_thinking
            self._print(text, is_dim=is_thinking)

    def end(self) -> None:
        """End the line."""
        if self._has_printed:
            self._print("\n")

    def _print(self, text: str, *, is_dim: bool = False) -> None:
        self._has_printed = True
        style = "dim" if is_dim else None
        result_console.print(text, end="", style=style, markup=False, soft_wrap=True)


def print_response(text: str, tags: "ThinkingTags") -> None:
    """Print a whole response."""
    from flexalign.generation.text import Piece

    parts = tags.split(text)
    pieces = [Piece(parts.thinking, True), Piece(parts.answer, False)]
    printer = ResponsePrinter(tags)
    printer.write(piece for piece in pieces if piece.text)
    printer.end()


# Settings and answers in words.


def describe_setting(setting: Setting, calibration: Mapping[str, Any] | None) -> str:
    """Name a setting, with the tokens it saves if the calibration measured them."""
    from flexalign.calibration.effort import Calibration, known_cut

    cut = None
    if calibration is not None:
        # A calibration that cannot be read is an error only for an effort; here it is left out.
        with suppress(ConfigError):
            cut = known_cut(Calibration.from_json(calibration), setting.id)
    if cut is None:
        return setting.id
    sign = "−" if cut[0] >= 0 else "+"
    return f"{setting.id}: {sign}{abs(100 * cut[0]):.0f} % tokens, {cut[1]}"


def describe_choice(answer: "Answer", setting: Setting, model: Any) -> str | None:
    """Return the route that a policy chose and why; None if no policy chose one."""
    if answer.route is None:
        return None
    if isinstance(setting.dial, Exit):
        return _describe_exit(answer, setting.dial.threshold)
    if not isinstance(setting.dial, Adaptive):
        return f"{answer.route}: by the coin"

    threshold = model.threshold(setting.dial)
    confidence = 0.0 if answer.confidence is None else answer.confidence
    shown = round_beside(confidence, threshold)
    if answer.route == "fast":
        return f"fast: confidence {shown} ≥ {threshold:g}"
    if confidence >= threshold:
        return "slow: the fast answer did not come to its end"
    return f"slow: fast answer's confidence {shown} < {threshold:g}"


def _describe_exit(answer: "Answer", threshold: float) -> str:
    if answer.confidence is None:
        return "no exit: no trial answer"
    shown = round_beside(answer.confidence, threshold)
    if answer.route == "fast":
        return f"exit: confidence {shown} ≥ {threshold:g}"
    if answer.confidence >= threshold:
        return "no exit: the last trial answer did not come to its end"
    return f"no exit: last trial answer's confidence {shown} < {threshold:g}"


def describe_tokens(answer: "Answer", tokens_per_second: float) -> str:
    """Return the number of tokens of an answer and their speed, in words.

    The thinking tags are counted with the answer.
    """
    parts = [f"{answer.tokens} tokens"]
    thinking, rejected = answer.thinking_tokens or 0, answer.rejected_tokens
    if thinking or rejected:
        shares = [f"{thinking} thinking", f"{answer.tokens - thinking - rejected} answer"]
        parts[0] += f" ({' + '.join(shares + [f'{rejected} rejected'] * bool(rejected))})"
    parts.append(f"{tokens_per_second:.0f} tokens/s")
    return " · ".join(parts + ["cut off"] * answer.truncated)


def round_beside(confidence: float, threshold: float) -> str:
    """Round to two digits, or to as many as keep it on the same side of the threshold."""
    digits, is_enough = 2, confidence >= threshold
    while (float(f"{confidence:.{digits}f}") >= threshold) != is_enough:
        digits += 1
    return f"{confidence:.{digits}f}"
