"""What libraries show beside a command's own output."""

import sys

import pytest
from tqdm.auto import tqdm
from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging

from flexalign.cli.console import progress_bar


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch):
    # Another test may have hidden it in this process.
    monkeypatch.setattr(modeling_gguf_pytorch_utils, "tqdm", tqdm)
    logging.enable_progress_bar()
    yield
    logging.enable_progress_bar()


def test_a_bar_of_ours_hides_those_of_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    def load() -> str:
        list(logging.tqdm(range(3), desc="Loading weights", file=sys.stderr))
        list(modeling_gguf_pytorch_utils.tqdm(range(3), desc="Converting", file=sys.stderr))
        return capsys.readouterr().err

    shown = load()
    assert "Loading weights" in shown
    assert "Converting" in shown
    with progress_bar("traces", 2):
        shown = load()
    assert "Loading weights" not in shown
    assert "Converting" not in shown
