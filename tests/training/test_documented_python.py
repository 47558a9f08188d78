"""The Python of docs/realign.md and docs/adapt.md runs as it is written."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {"realign.md": 3, "adapt.md": 1}
EXAMPLES = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(BLOCK.findall((DOCS / page).read_text(encoding="utf-8")))
]


def test_the_pages_have_examples() -> None:
    assert len(EXAMPLES) == sum(PAGES.values())


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(
    example: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs", "exec"), {})
    assert capsys.readouterr().out
    assert any(tmp_path.glob("out/*/manifest.json"))
