"""Change the mathematics in a thousand small ways, and see whether the tests notice each.

mutmut makes the mutants and runs the tests on them, as ``[tool.mutmut]`` in pyproject.toml says.
This script starts it afresh and holds what survives against ``tools/mutation.toml``, where each
survivor has a reason why no test could tell it from the original. It fails where one has none, and
names the reasons that are no longer needed.

    python tools/mutation.py                                       all
    python tools/mutation.py --only 'flexalign.lambdas.*'        some, by the names of mutmut
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant

ROOT = Path(__file__).parents[1]
MUTANTS = ROOT / "mutants"
EXPLAINED = Path(__file__).with_suffix(".toml")
KILLED = {1, 3}
OUT_OF_TIME = {24, -24, 36, 152, 255}
MATHEMATICS = (
    "flexalign.fusion.*",
    "flexalign.losses.*",
    # Of the file of λ the numbers and the schedules; how a dial is written is no mathematics.
    "flexalign.lambdas.*Schedule*",
    *(f"flexalign.lambdas.x_{name}__mutmut_*" for name in ("finite_lambda", "_real", "_known")),
    *(f"flexalign.lambdas.x_{name}__mutmut_*" for name in ("_between", "_along", "_points")),
    "flexalign.lambdas.x__count__mutmut_*",
)


def main() -> int:
    """Run mutmut and judge; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes at one time (default 2)")
    parser.add_argument("--only", default="", help="names of mutants, with * for any text")
    parser.add_argument(
        "--allow",
        type=int,
        default=0,
        help="how many may survive without a reason (another processor rounds otherwise)",
    )
    options = parser.parse_args()
    os.chdir(ROOT)
    start = time.monotonic()
    if not _run(options.jobs, options.only) or not _every_test_is_found():
        return 1
    seconds = time.monotonic() - start

    ended = {"killed": 0, "ran out of time": 0, "survived": 0}
    survivors: dict[str, list[str]] = {}
    slow = set()
    for name, code, path in _results():
        outcome = (
            "killed" if code in KILLED else "ran out of time" if code in OUT_OF_TIME else "survived"
        )
        ended[outcome] += 1
        if outcome == "killed":
            continue
        diff = get_diff_for_mutant(name, path=path)
        if outcome == "survived":
            survivors.setdefault(_signature(name, diff), []).append(f"# {name}: {code}\n{diff}")
        else:  # which says nothing against a reason
            slow.add(_signature(name, diff))
    explained = _explained()
    alive = [diff for key, diffs in survivors.items() if key not in explained for diff in diffs]
    dead = [] if options.only else sorted(explained - set(survivors) - slow)
    for diff in alive:
        print(diff, end="\n\n")
    for key in dead:
        print(f"note: {EXPLAINED.name} explains what does not survive: {key}")
    counts = ", ".join(f"{count} {outcome}" for outcome, count in ended.items())
    print(f"{sum(ended.values())} mutants in {seconds:.0f} s: {counts}, {len(alive)} unexplained")
    return 1 if len(alive) > options.allow else 0


def _run(jobs: int, only: str) -> bool:
    """Start mutmut without what an earlier run left: it does not see that tests have changed."""
    shutil.rmtree(MUTANTS, ignore_errors=True)
    command = [Path(sys.executable).with_name("mutmut"), "run", "--max-children", str(jobs)]
    settings = {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # none is needed, and each mutant would load them
        "HYPOTHESIS_PROFILE": "mutation",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, *([only] if only else MATHEMATICS)],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print(done.stdout[-5000:])
    return done.returncode == 0


def _every_test_is_found() -> bool:
    """Ask pytest for each test by its name; one that it does not find would count as a kill."""
    stats = json.loads((MUTANTS / "mutmut-stats.json").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--rootdir=.", *stats["duration_by_test"]],
        cwd=MUTANTS,
        env=os.environ | {"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(f"a test cannot be asked for by its name; give its cases ids:\n{done.stdout[-2000:]}")
        print(done.stderr[-2000:])
    return done.returncode == 0


def _results() -> Iterator[tuple[str, int, Path]]:
    """Each mutant that was tried: its name, how its tests ended, and where it comes from."""
    for meta in sorted(MUTANTS.rglob("*.meta")):
        path = meta.relative_to(MUTANTS).with_suffix("")
        codes = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
        yield from ((name, code, path) for name, code in codes.items() if code is not None)


def _signature(name: str, diff: str) -> str:
    """Name a mutant by its function and its changed line, which stay when its number moves."""
    module, _, mangled = name.partition("__mutmut_")[0].rpartition(".")
    function = mangled.removeprefix("x").removeprefix("_").strip("ǁ").replace("ǁ", ".")
    changed = [line[1:].strip() for line in diff.splitlines()[2:] if line.startswith("+")]
    return f"{module.removeprefix('flexalign.')}.{function}: {' '.join(changed)}"


def _explained() -> set[str]:
    groups = tomllib.loads(EXPLAINED.read_text(encoding="utf-8"))["explained"]
    return {key for group in groups for key in group["mutants"]}


if __name__ == "__main__":
    sys.exit(main())
