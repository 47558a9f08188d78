"""The page in a real browser: what it shows, what it keeps as text, and that a phone can read it."""

import html
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from browser import CHROMIUM
from flexalign.evaluation.report import write_report

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const page = document.getElementById("phone").contentDocument;
  const { scrollWidth, clientWidth } = page.documentElement;
  const wide = page.defaultView.innerWidth;
  document.body.replaceChildren(`${wide} wide, ${scrollWidth - clientWidth} beyond`);
}, 1500));
</script>
"""


@pytest.fixture(scope="module")
def page(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = [make_run(questions=6, samples=2), make_run(name="later", questions=6, samples=2)]
    return write_report(runs, tmp_path_factory.mktemp("report"))


def _chromium(file: Path, *arguments: str) -> str:
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={file.parent / 'profile'}",
            "--virtual-time-budget=5000",
            *arguments,
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def test_everything_is_drawn_and_model_text_stays_text(page: Path):
    shown = _chromium(page, "--dump-dom")
    for place in ("pareto-chart", "dial-chart", "lengths-chart", "budget-surface", "hard-chart"):
        chart = shown.split(f'id="{place}"')[1].split("</svg>")[0]
        assert "NaN" not in chart
        assert chart.count("<text") > 5, place
    assert "<title>flexalign report</title>" in shown
    assert '<b id="taken">' not in shown
    assert "&lt;script&gt;document.title=" in shown
    assert "λ\u00a0=\u00a00.5" in shown or "λ&nbsp;=&nbsp;0.5" in shown
    assert len(re.findall(r'class="card"', shown)) == 12


def test_a_phone_never_scrolls_sideways(page: Path, tmp_path: Path):
    wrapper = tmp_path / "phone.html"
    content = html.escape(page.read_text(encoding="utf-8"), quote=True)
    frame = f'<iframe id="phone" style="width:375px;height:800px;border:0" srcdoc="{content}">'
    wrapper.write_text(f'<meta charset="utf-8"><body>{frame}</iframe>{PROBE}', encoding="utf-8")
    assert "375 wide, 0 beyond" in _chromium(wrapper, "--dump-dom", "--window-size=900,900")
