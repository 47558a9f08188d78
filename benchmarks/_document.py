"""The results document, whose generated sections stand between marks."""

from pathlib import Path
from tempfile import gettempdir

from filelock import FileLock

REPORT = Path("docs/results.md")


def put_section(name: str, text: str) -> None:
    """Replace what stands between the marks of a section, one benchmark at a time."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    with FileLock(Path(gettempdir()) / "flexalign-results.lock"):
        before, rest = REPORT.read_text(encoding="utf-8").split(begin)
        after = rest.split(end)[1]
        REPORT.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")
