"""What a command lets through of what libraries say."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flexalign.cli._shared import console, note

__all__ = ["quieten_libraries", "warnings_as_notes"]


def quieten_libraries() -> None:
    """Keep other libraries' notices off the terminal: ours say what matters."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Of several processes (torchrun, accelerate launch) the first one speaks.
    console.quiet = os.environ.get("RANK", "0") != "0"


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print warnings for users as one line each on stderr, and drop those for developers."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if category is UserWarning:
            note(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield
