from typing import Any

import pytest


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if any model's weights are loaded."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
