"""What `flexalign evaluate` finds: the miniature's whole table, and SmolLM2-135M on GSM8K.

Run it from the repository:

    python benchmarks/evaluate.py                    # 500 questions × 2 of the miniature; GSM8K
    python benchmarks/evaluate.py --questions 100 --samples 1 --only miniature   # minutes
    python benchmarks/evaluate.py --rewrite          # only write the last run's report again

GSM8K is read from FLEXALIGN_DATA; its pair is SmolLM2-135M-Instruct and the concise LoRA adapter
that examples/smollm2/run.py trains. What is not there is left out, and the last run's figures of
it are kept. Both are sweeps of the command line: broken off, they go on where they stopped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _document import put_section

RAW = Path("benchmarks/results/evaluate.json")
PICTURE = Path("docs/pictures/report.png")

MINIATURE = [
    *("model:miniature:reference", "model:miniature:aligned"),
    *("pair:miniature", "dial:miniature,miniature:fast"),
    *("--task", "miniature", "--lambda", "0,0.5,1,2", "--lambda-range", "0,2"),
    *("--policy", "adaptive 0.5", "--policy", "adaptive 0.9", "--policy", "route 0.5"),
    *("--max-new-tokens", "400", "--batch-size", "250"),
    *("--baseline", "model:miniature:reference"),
]
ALIGNED = Path("out/smollm2/aligned")
SMOLLM2 = [
    *(f"pair:smollm2,{ALIGNED}", "--task", "gsm8k", "--limit", "100", "--samples", "1"),
    *("--lambda", "0,1", "--max-new-tokens", "200", "--batch-size", "50"),
]

HEADER = (
    "| system | setting | accuracy, % | tokens | cut, % | over the coin | truncated, % "
    "| unparsed, % | no answer, % |\n|---|---|--:|--:|--:|--:|--:|--:|--:|"
)


def sweep(arguments: Sequence[str], output: Path) -> dict[str, Any]:
    """Run the command, or go on with it, and return its summary."""
    command = [Path(sys.executable).with_name("flexalign"), "evaluate", *arguments]
    done = subprocess.run(
        [*map(str, command), "--output", str(output), "--json"], check=True, stdout=subprocess.PIPE
    )
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def figure(value: float | None, interval: Sequence[float | None] | None, scale: float) -> str:
    if value is None:
        return "—"
    text = f"{scale * value:.1f}"
    if interval is None or None in interval:
        return text
    low, high = (scale * float(end or 0.0) for end in interval)
    return f"{text} [{low:.1f}, {high:.1f}]"


def line(row: dict[str, Any]) -> str:
    cells = [
        f"`{row['system']}`",
        row["setting"],
        figure(row["accuracy"], row["accuracy_ci"], 100),
        figure(row["tokens"], row["tokens_ci"], 1),
        figure(row["token_cut"], row["token_cut_ci"], 100),
        figure(row["chord_distance"], row["chord_distance_ci"], 100),
        *(f"{100 * row[name]:.1f}" for name in ("truncated", "unparsed", "no_answer")),
    ]
    return f"| {' | '.join(cells)} |"


def table(summary: dict[str, Any]) -> list[str]:
    return [HEADER, *map(line, summary["rows"]), ""]


def section(results: dict[str, dict[str, Any]]) -> str:
    """The section's text: what was asked, the tables, and the report's picture."""
    lines = [
        "Brackets: 95 % intervals, clustered by question. *Cut*: of tokens, against λ = 0 of the "
        "same dial (plain models: against the reference). *Over the coin*: points of accuracy "
        "above the chord, that is above what sending each question to λ = 0 or λ = 1 by a coin "
        "reaches at equal tokens.",
        "",
    ]
    if "miniature" in results:
        rows = results["miniature"]["rows"]
        count, each = rows[0]["n_questions"], rows[0]["n_samples"] // rows[0]["n_questions"]
        lines += [
            f"**The miniature**, `python benchmarks/evaluate.py --questions {count} --samples "
            f"{each}`: the same {count} questions and seeds for every setting, "
            f"{'one response' if each == 1 else f'{each} responses'} each at temperature 1, at most "
            "400 tokens.",
            "",
            *table(results["miniature"]),
            "The report that the same command wrote:",
            "",
            f"![The report of the sweep](pictures/{PICTURE.name})",
            "",
        ]
    if "smollm2" in results:
        lines += [
            "**SmolLM2-135M-Instruct on GSM8K**, `python benchmarks/evaluate.py --only smollm2` with "
            "GSM8K in FLEXALIGN_DATA: 100 questions of the test part, one response each "
            "at temperature 0.7 and top-p 0.95, at most 200 tokens; λ = 1 is the concise LoRA "
            "adapter of examples/smollm2. A model of this size cannot do these questions, and its "
            "accuracy is near zero; what it writes, how often it is cut off and how often no "
            "answer can be read are real.",
            "",
            *table(results["smollm2"]),
        ]
    return "\n".join(lines)


def publish(results: dict[str, dict[str, Any]]) -> None:
    """Put the section between its marks in the results document."""
    put_section("evaluate", section(results))


def photograph(page: Path) -> None:
    """Take the report's picture in Chromium, where there is one."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        print("chromium is not installed: the report's picture is left as it is", file=sys.stderr)
        return
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += [f"--user-data-dir={(page.parent / 'profile').resolve()}"]
    flags += ["--virtual-time-budget=5000", "--window-size=1100,950"]
    shot = f"--screenshot={PICTURE.resolve()}"
    subprocess.run(
        [browser, *flags, shot, page.resolve().as_uri()], check=True, capture_output=True
    )
    shutil.rmtree(page.parent / "profile", ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--only", choices=["miniature", "smollm2"])
    parser.add_argument("--work", type=Path, default=Path("out/evaluate"))
    parser.add_argument("--rewrite", action="store_true", help="only write the last run's report")
    chosen = parser.parse_args()
    results = json.loads(RAW.read_text(encoding="utf-8")) if RAW.is_file() else {}
    if not chosen.rewrite and chosen.only != "smollm2":
        size = ["--limit", str(chosen.questions), "--samples", str(chosen.samples)]
        folder = chosen.work / f"miniature-{chosen.questions}x{chosen.samples}"
        results["miniature"] = sweep([*MINIATURE, *size], folder)
        photograph(folder / "report.html")
    if not chosen.rewrite and chosen.only != "miniature":
        if ALIGNED.is_dir() and os.environ.get("FLEXALIGN_DATA"):
            results["smollm2"] = sweep(SMOLLM2, chosen.work / "smollm2")
        else:
            print(f"no {ALIGNED} or no FLEXALIGN_DATA: GSM8K is left out", file=sys.stderr)
    RAW.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    publish(results)


if __name__ == "__main__":
    main()
