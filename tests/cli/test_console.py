"""What libraries show beside a command's own output."""

import io
import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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


def test_a_label_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("sm :smile: [bold]", 2) as show:
        show(2)
    assert "sm :smile: [bold]" in capsys.readouterr().err


def test_a_name_with_the_form_of_an_emoji_is_printed_as_it_is(
    run_cli: Callable[..., Any], tiny_pair: Any, tmp_path: Path
) -> None:
    shutil.copytree(tiny_pair.reference, tmp_path / "o2")
    result = run_cli(
        "evaluate", f"model:{tmp_path / 'o2'}", "--task", "miniature", "--limit", 1, "--samples", 1,
        "--dry-run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "model:o2: as it is" in result.stderr


def test_an_answer_with_the_form_of_an_emoji_is_printed_as_it_is(
    run_cli: Callable[..., Any],
    tiny_tokenizer: Any,
    tiny_model: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = ":smile:"
    model = tiny_model()
    # The layers add nothing, so that a token is determined by the one before it: after the colon an
    # "s", and so on, and after any other token a colon.
    ids = tiny_tokenizer(list(written), add_special_tokens=False)["input_ids"]
    assert all(len(one) == 1 for one in ids)
    chain = [one[0] for one in ids]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_()
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding[:, 0] = 1
        head[chain[0], 0] = 1
        for place, (token, following) in enumerate(itertools.pairwise(chain), start=1):
            embedding[token] = torch.eye(embedding.shape[1])[place]
            head[following, place] = 1
    for part in (model, tiny_tokenizer):
        part.save_pretrained(tmp_path / "smiling")

    options = (tmp_path / "smiling", "--temperature", 0, "--max-new-tokens", len(written))
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    for result in (run_cli("generate", *options, "hello"), run_cli("chat", *options)):
        assert result.exit_code == 0, result.stderr
        assert written in result.stdout.splitlines()
