"""`benchmarks/gpu.py`: its plan, parts that fail or take too long, its section, and a rehearsal."""

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ORDER = ["tests", "loss", "training", "decode", "vllm"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, as a module; what it imports from its folder is forgotten again."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    yield importlib.import_module("gpu")
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == ROOT / "benchmarks":
            del sys.modules[name]


def parts(gpu: ModuleType, **limits: int) -> tuple[Any, ...]:
    known = {part.name: part for part in gpu.PLAN}
    return tuple(gpu.Part(n, known[n].title, s, s, known[n].run) for n, s in limits.items())


def test_the_plan_keeps_to_eight_minutes_and_its_rehearsal_to_two(gpu: ModuleType) -> None:
    assert [part.name for part in gpu.PLAN] == ORDER == list(gpu.TABLES)
    assert sum(part.seconds for part in gpu.PLAN) <= gpu.LIMIT == 480
    assert sum(part.rehearsed for part in gpu.PLAN) <= gpu.REHEARSAL_LIMIT == 120


def test_methods_and_files_that_the_plan_names_are_there(gpu: ModuleType) -> None:
    import dials
    import loss

    assert {"ours", "materialised", "trl", "liger"} <= loss.ON_A_GPU.keys()
    source = (ROOT / "benchmarks" / "dials.py").read_text(encoding="utf-8")
    made = source[source.index("def all_methods") : source.index("@torch.no_grad()")]
    for name in ("plain", *gpu.DECODED):
        assert f'"{name}": ' in made, name
    assert dials.SHAPE.vocab_size == 49152
    marked = [
        path.name
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"\bmark\.gpu\b", path.read_text(encoding="utf-8"))
    ]
    assert {"test_losses.py", "test_gpu.py"} <= set(marked)


def test_what_a_part_found_is_kept_when_it_fails_or_runs_out_of_time(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the script is run in its place: it writes one row, then fails or waits."""
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(
        "import json, os, sys, time\n"
        "name, into = sys.argv[2], sys.argv[4]\n"
        "found = {'rows': [{'tests': 3, 'passed': 2, 'failures': 1, 'errors': 0, 'skipped': 0}],"
        " 'notes': ['one was there'], 'skipped': None}\n"
        "open(into + '.part', 'w').write(json.dumps(found))\n"
        "os.replace(into + '.part', into)\n"
        "time.sleep(3600 if name == 'loss' else 0)\n"
        "sys.exit('ValueError: nothing works' if name == 'tests' else 0)\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(gpu, "__file__", str(stand_in))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.subprocess, "Popen", Impatient)
    for name in ("loss", "decode"):
        monkeypatch.setitem(gpu.TABLES, name, gpu.TABLES["tests"])
    plan = parts(gpu, tests=600, loss=600, decode=600)
    found = gpu.run_plan(
        plan, tmp_path / "gpu.json", is_rehearsal=True, vllm_python=tmp_path / "none"
    )
    assert json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8")) == found
    states = {name: part["state"] for name, part in found["parts"].items()}
    assert states == {"tests": "failed", "loss": "timed out", "decode": "done"}
    assert found["parts"]["tests"]["reason"] == "ValueError: nothing works"
    assert found["parts"]["loss"]["reason"].startswith("it was ended after ")
    for part in found["parts"].values():
        assert (part["rows"][0]["passed"], part["notes"]) == (2, ["one was there"])
        assert part["limit"] > 599  # what one part leaves the next ones have


class Impatient(subprocess.Popen[bytes]):
    """Its time is up as soon as the part that waits has written its row."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait, or see the file of the stand-in that sleeps and raise."""
        assert isinstance(self.args, list)
        if timeout is None or "loss" not in self.args:
            return super().wait(timeout)
        into = Path(str(self.args[self.args.index("--into") + 1]))
        while not into.exists():
            time.sleep(0.05)
        raise subprocess.TimeoutExpired(self.args, timeout)


def test_without_vllm_its_part_is_skipped_by_name(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    [part] = parts(gpu, vllm=5)
    found = gpu.run_part(part, 5.0, True, tmp_path / "python")
    assert (found["state"], found["rows"]) == ("skipped", [])
    assert found["reason"].startswith("vLLM is not installed here, nor ")


def test_the_section_is_what_the_results_hold(gpu: ModuleType, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    begin, end = "<!-- gpu: begin -->\n", "<!-- gpu: end -->"
    assert page.split(begin)[1].split(end)[0] == gpu.section()
    assert gpu.section(tmp_path / "none.json").startswith("Not measured: ")


def test_the_section_has_a_table_for_each_part_and_says_what_did_not_run(
    gpu: ModuleType, tmp_path: Path
) -> None:
    loss = {"T": 8, "V": 9, "H": 4, "dtype": "bfloat16", "runs": 5, "mib": 100.0, "loss": 2.0}
    step = {"tokens": 8, "parameters": 1000, "lam": 2.0, "optimizer": 0.1, "mib": 9.0}
    decoded = {"batch": 16, "prompt": 8, "new_tokens": 4, "rounds": 3, "ms_per_step": 2.5}
    decoded |= {"tokens_per_second": 6400.0, "prefill_to_plain": 1.5, "memory_to_plain": 2.0}
    engine = {"dial": "lora", "runner": "V2", "cuda_graphs": "FULL"}
    mix = {"kind": "mix", "requests": 20, "tokens": 24, "lambdas": [0.0, 0.5], "regret": 0.0}
    speed = {"kind": "throughput", "row": "decode:8", "ratio": 0.91, "range": [0.9, 0.95]}
    speed |= {"plain_tokens_per_second": 1000.0, "tokens_per_second": 910.0}
    rows = {
        "tests": [{"tests": 19, "passed": 18, "failures": 1, "errors": 0, "skipped": 0}],
        "loss": [
            loss | {"method": "ours", "seconds": 0.010},
            loss | {"method": "liger", "seconds": 0.015, "mib": 250.0, "loss": 2.002},
        ],
        "training": [step | {"variant": "GKD", "seconds": 0.5, "to_sft": 1.25}],
        "decode": [decoded | {"method": "inra", "to_plain": 1.75}],
        "vllm": [mix | engine | {"error": 0.013}, speed | engine],
    }
    done = {"state": "done", "reason": None, "seconds": 12.3, "limit": 40.0, "notes": []}
    found = {name: done | {"rows": own} for name, own in rows.items()}
    found["training"] |= {"state": "timed out", "reason": "it was ended after 100 s"}
    found["loss"]["notes"] = ["trl, bfloat16: trl is not installed here"]
    machine = {
        "gpu": "NVIDIA H200",
        "gpu_gib": 139.8,
        "cuda": "13.0",
        "packages": {"torch": "2.11"},
    }
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"machine": machine, "parts": found}), encoding="utf-8")
    text = gpu.section(path)
    for line in (
        "`make gpu`: NVIDIA H200, 139.8 GiB, CUDA 13.0; torch 2.11.",
        "| 19 | 18 | 1 | 0 |",
        "| 8 | 9 | 4 | bfloat16 | liger | 15.0 | 1.50 | 250 | 2.50 | +1.0e-03 |",
        "* trl, bfloat16: trl is not installed here",
        "(`training`, timed out after 12 s: it was ended after 100 s)",
        "| GKD | 1,000 | 8 | 500.0 | 1.25 | 100.0 | 9 |",
        "| 16 | inra | 2.5 | 6400 | 1.75 | 1.50 | 2.00 |",
        "| lora | 20 | 0, 0.5 | V2 | FULL | 1.3e-02 | 0.0e+00 |",
        "| decode:8 | lora | V2 | FULL | 1000.0 | 910.0 | 0.91 (0.90–0.95) |",
    ):
        assert line in text, line


@pytest.mark.full
@pytest.mark.parametrize("name", ["loss", "training", "decode"])
def test_a_part_is_rehearsed_on_the_cpu(gpu: ModuleType, tmp_path: Path, name: str) -> None:
    [part] = parts(gpu, **{name: 300})
    found = gpu.run_part(part, 300.0, True, tmp_path / "none")
    assert (found["state"], found["reason"]) == ("done", None)
    rows = found["rows"]
    assert len(gpu.TABLES[name](rows)) == 2 + len(rows)
    if name == "loss":
        for dtype in ("bfloat16", "float32"):
            losses = {row["method"]: row["loss"] for row in rows if row["dtype"] == dtype}
            assert losses["ours"] == pytest.approx(losses["materialised"], rel=1e-4)
            assert losses["ours"] == pytest.approx(losses["trl"], rel=1e-4)
    elif name == "training":
        assert [row["variant"] for row in rows] == ["SFT", "TrRa online", "GKD"]
    else:
        asked = {(batch, method) for batch in (1, 2) for method in ("plain", *gpu.DECODED)}
        assert {(row["batch"], row["method"]) for row in rows} == asked
