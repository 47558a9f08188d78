"""What a GPU is asked first, in at most eight minutes: tests, loss, training, decoding, vLLM.

Run it from the repository:

    make gpu                                          # the same with the environment's Python
    python benchmarks/gpu.py                          # all parts, in the order of PLAN
    python benchmarks/gpu.py --parts loss decode      # some; what is recorded of others stays
    python benchmarks/gpu.py --rewrite                # only the section of docs/results.md

Every part runs in a process of its own, with a limit in time: what an earlier part leaves of its limit
the next ones may use. A part writes each figure when it has it, so that one that fails or runs out of
time keeps what it found. After each part `benchmarks/results/gpu.json` (`--results`) is written and
the part is reported. What is not installed is said, and the other parts run.

Without a GPU the same code is rehearsed on the CPU in two minutes, at small shapes. Its figures say
nothing; they go to `out/gpu-rehearsal.json`.

* ``tests``: the tests that are marked ``gpu``;
* ``loss``: forward and backward at T = 4096 and V = 151936: ours, the logits in full, TRL's chunked
  loss, and Liger's two, all of the same reverse KL (``benchmarks/loss.py``);
* ``training``: a step of SFT, TrRa and TRL's GKD in turns, one row of 4096 tokens
  (``benchmarks/training.py``);
* ``decode``: each dial beside the plain model at batch 1, 16 and 64 (``benchmarks/dials.py``);
* ``vllm``: requests of several λ in one batch against the library, by log-probabilities, and each
  dial's throughput beside plain, with model runner V2 and CUDA graphs (``benchmarks/dials_vllm.py``).
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
REHEARSAL = ROOT / "out" / "gpu-rehearsal.json"
LIMIT, REHEARSAL_LIMIT = 480, 120
"""Seconds of all parts together."""

_PACKAGES = ("flexalign", "torch", "transformers", "trl", "peft", "triton", "liger-kernel", "vllm")

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A part of the plan.

    Attributes:
        name: Its name.
        title: What it measures, for reports.
        seconds: Its limit on a GPU.
        rehearsed: Its limit in a rehearsal.
        run: Does it.
    """

    name: str
    title: str
    seconds: int
    rehearsed: int
    run: "Callable[[Recorder, bool], None]"


class Recorder:
    """Writes the figures of a part as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {"rows": [], "notes": [], "skipped": None}

    def add(self, **row: Any) -> None:
        """Add a row of figures."""
        self._found["rows"].append(row)
        print(json.dumps(row), flush=True)
        self._write()

    def note(self, text: str) -> None:
        """Add a sentence, such as that a package is missing."""
        self._found["notes"].append(text)
        print(text, flush=True)
        self._write()

    def skip(self, reason: str) -> None:
        """Say why the part is not run here."""
        self._found["skipped"] = reason
        self._write()

    def _write(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._found), encoding="utf-8")
        partial.replace(self._path)


# The parts, each run in a process of its own.


def _tests(record: Recorder, is_rehearsal: bool) -> None:
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"\bmark\.gpu\b", path.read_text(encoding="utf-8"))
    ]
    with TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        subprocess.run([*command, f"--junitxml={report}", *files], cwd=ROOT, check=False)
        if not report.exists():
            raise RuntimeError("pytest wrote no report")
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))

    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    record.add(passed=passed, **counts)
    for case in suite.iter("testcase"):
        for fault in [*case.iter("failure"), *case.iter("error")]:
            record.note(f"{case.get('name')}: {_first_line(fault.get('message') or 'failed')}")
    if is_rehearsal and passed:
        raise RuntimeError("tests of a GPU passed without one")


def _loss(record: Recorder, is_rehearsal: bool) -> None:
    import torch
    from loss import ON_A_GPU, Inputs, measure

    device, runs = ("cpu", 2) if is_rehearsal else ("cuda", 5)
    T, V, H = (64, 512, 32) if is_rehearsal else (4096, 151936, 2048)
    for dtype in (torch.bfloat16, torch.float32):
        inputs = Inputs(T, V, H, device, dtype)
        for name, method in ON_A_GPU.items():
            place = {"dtype": str(dtype).removeprefix("torch."), "T": T, "V": V, "H": H}
            try:
                # The first one compiles what is compiled.
                _, *found = [measure(method, inputs, device) for _ in range(runs + 1)]
            except Exception as error:
                record.note(f"{name}, {place['dtype']}: {_reason(error)}")
                continue
            medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
            record.add(**place, method=name, runs=runs, **medians)


def _training(record: Recorder, is_rehearsal: bool) -> None:
    from datasets import disable_progress_bars
    from transformers.utils import logging

    from training import (
        LAM,
        TINY,
        Setup,
        in_own_process,
        measure,
        over_a_period,
        turn_by_turn,
        write_models,
    )

    logging.set_verbosity_error()
    disable_progress_bars()
    shape = TINY | {"vocab_size": 2048} if is_rehearsal else HALF_A_BILLION
    with TemporaryDirectory() as scratch:
        ids = shape["vocab_size"] - 1
        setup = Setup(Path(scratch), 4096, 1024, "cuda", ids)
        if is_rehearsal:
            setup = Setup(Path(scratch), 64, 16, "cpu", ids)
        in_own_process(write_models, setup.folder, shape, None)
        names = ["SFT", "TrRa online", "GKD"]
        try:
            found = measure(setup, 1, names)
        except RuntimeError as error:
            record.note(f"{error}: {_reason(error.__cause__ or error)}")
            found = measure(setup, 1, names[:2])

    for name, one in found.items():
        relative = turn_by_turn(one["seconds"], found["SFT"]["seconds"])
        record.add(
            variant=name,
            tokens=setup.tokens,
            parameters=_parameters(shape),
            lam=LAM,
            seconds=over_a_period(one["seconds"]),
            to_sft=over_a_period(relative),
            optimizer=statistics.median(one["optimizer"]),
            mib=one["mib"],
        )


def _decode(record: Recorder, is_rehearsal: bool) -> None:
    import torch
    from dials import all_methods, measure
    from transformers import LlamaConfig

    device, batches, prompt, new_tokens, rounds = "cuda", (1, 16, 64), 128, 32, 3
    shape = ONE_AND_A_HALF_BILLION
    if is_rehearsal:
        device, batches, prompt, new_tokens, rounds = "cpu", (1, 2), 8, 4, 2
        shape = shape | {"vocab_size": 512, "hidden_size": 48, "intermediate_size": 96}
        shape |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    made = all_methods(torch.bfloat16, device, LlamaConfig(**shape))

    # One short answer of each: what cannot run here does not keep the others from running.
    methods = {"plain": made["plain"]}
    for name in DECODED:
        try:
            pair = {"plain": made["plain"], name: made[name]}
            measure(pair, "bfloat16:8:1", 1, 1, 2, device)
        except Exception as error:
            record.note(f"{name}: {_reason(error)}")
            continue
        methods[name] = made[name]

    for batch in batches:
        found = measure(methods, f"bfloat16:{prompt}:{batch}", rounds, 1, new_tokens, device)
        plain = found["plain"]
        for name, own in found.items():
            step = statistics.median(own["decode"]) / new_tokens
            pairs = zip(own["decode"], plain["decode"], strict=True)
            record.add(
                method=name,
                batch=batch,
                prompt=prompt,
                new_tokens=new_tokens,
                rounds=rounds,
                ms_per_step=1000 * step,
                tokens_per_second=batch / step,
                to_plain=statistics.median(one / other for one, other in pairs),
                prefill_to_plain=own["prefill"][0] / plain["prefill"][0],
                memory_to_plain=own["mib"][0] / plain["mib"][0],
            )


def _vllm(record: Recorder, is_rehearsal: bool) -> None:
    import torch
    from _vllm_engines import RANK, Engine, folders, measure

    if not is_rehearsal and not torch.cuda.is_available():
        record.skip(f"{sys.executable} has vLLM's build for CPUs, or none that sees this GPU.")
        return
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # each is in a process of its own already
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    options: dict[str, Any] = {}
    if not is_rehearsal:
        # Several engines start at once on one GPU: none may measure what the others leave.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
        options = {"gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 4 * 2**30}

    with TemporaryDirectory() as scratch:
        where = Path(scratch)
        mixes = _start_mixes(where, options, is_rehearsal)
        engines = {}
        if not is_rehearsal:
            made = folders(where, RANK)
            engines = {
                name: Engine(folder, True, "wall", 4000, **options) for name, folder in made.items()
            }
        for name, engine in _answering(record, mixes, "mix").items():
            record.add(kind="mix", dial=name, **_compare_mix(name, engine), **engine.facts)
        engines = _answering(record, engines, "throughput")
        for row in ("decode:1", "decode:8", "decode:32", "prefill:4000") if engines else ():
            found = measure(engines, row, 3, 64)
            for name, dial in found["dials"].items():
                speed = {key: found["tokens_per_second"][key] for key in ("plain", name)}
                record.add(
                    kind="throughput",
                    dial=name,
                    row=row,
                    ratio=dial["ratio"],
                    range=dial["range"],
                    plain_tokens_per_second=speed["plain"],
                    tokens_per_second=speed[name],
                    **engines[name].facts,
                )


def _answering(record: Recorder, engines: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the engines that have started; of the others it is noted why not."""
    found = {}
    for name, engine in engines.items():
        try:
            engine.wait()
        except (RuntimeError, EOFError) as error:
            record.note(f"{kind}, {name}: {_reason(error)}")
        else:
            found[name] = engine
    return found if kind == "mix" or "plain" in found else {}


MIXES = {
    "inra": ("miniature:fast", (0.0, 0.25, 0.5, 0.75, 1.0)),
    "lora": ("miniature:dial", (0.0, 0.5, 1.0, 2.0, 5.0)),
}
"""The dials of the miniature, and the λ of the requests of one batch."""
MIXED_REQUESTS, MIXED_TOKENS = 20, 24


def _start_mixes(where: Path, options: dict[str, Any], is_rehearsal: bool) -> dict[str, Any]:
    """Start an engine for each dial of the miniature; in a rehearsal for one, without compiling."""
    from _vllm_engines import Engine

    from flexalign.serving.vllm.folder import prepare_folder

    engines = {}
    for name in ["lora"] if is_rehearsal else MIXES:
        folder = prepare_folder("miniature:reference", MIXES[name][0], where / f"mixed-{name}")
        engines[name] = Engine(folder, not is_rehearsal, "wall", 64, **options)
    return engines


def _compare_mix(name: str, engine: Any) -> Row:
    """Ask one batch of several λ, and read what was written with the library, one by one."""
    import random

    import torch

    from flexalign.miniature.build import CONTEXT_TOKENS, encode
    from flexalign.miniature.tokenizer import build_tokenizer
    from flexalign.miniature.world import REFERENCE, sample_question, sample_trace
    from flexalign.systems.dials import load_dial

    draw, tokenizer = random.Random(0), build_tokenizer(CONTEXT_TOKENS)
    questions = [sample_question(draw) for _ in range(MIXED_REQUESTS)]
    prompts = [encode(tokenizer, q.text, sample_trace(q, REFERENCE, draw))[0] for q in questions]
    adapter, choices = MIXES[name]
    lams = [choices[place % len(choices)] for place in range(MIXED_REQUESTS)]
    answers = engine.answers(prompts, lams, MIXED_TOKENS)

    # The engine's weights are rounded to bfloat16; its arithmetic is what is compared.
    dial = load_dial("miniature:reference", adapter).bfloat16().float().eval()
    errors, regrets = [], []
    for prompt, lam, (tokens, logprobs) in zip(prompts, lams, answers, strict=True):
        with torch.no_grad():
            logits = dial(torch.tensor([prompt + tokens[:-1]]), lam=lam).logits[0]
        expected = logits[len(prompt) - 1 :].log_softmax(-1)
        chosen = expected.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        errors.append(float((chosen - torch.tensor(logprobs)).abs().max()))
        regrets.append(float((expected.amax(-1) - chosen).max()))
    return {
        "requests": MIXED_REQUESTS,
        "tokens": MIXED_TOKENS,
        "lambdas": list(choices),
        "error": max(errors),
        "regret": max(regrets),
    }


HALF_A_BILLION = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
"""The shape of Qwen2.5-0.5B."""
ONE_AND_A_HALF_BILLION = HALF_A_BILLION | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
}
"""The shape of Qwen2.5-1.5B."""
DECODED = (
    *("lora", "lora, λ=0", "lora, kept merged", "PEFT"),
    *("inra", "inra, λ=0", "two models"),
)
"""Methods of `benchmarks/dials.py` beside plain."""

PLAN = (
    Part("tests", "Tests marked gpu", 40, 25, _tests),
    Part("loss", "The loss", 50, 15, _loss),
    Part("training", "A training step", 100, 25, _training),
    Part("decode", "Decoding with each dial", 120, 20, _decode),
    Part("vllm", "vLLM", 165, 30, _vllm),
)


def _parameters(shape: dict[str, Any]) -> int:
    from transformers import AutoConfig

    from flexalign.models.loading import skeleton

    model = skeleton(AutoConfig.for_model("llama", **shape))
    return sum(parameter.numel() for parameter in model.parameters())


def _reason(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed here"
    return f"{type(error).__name__}: {_first_line(str(error))}"


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:200]


# The plan, run part by part.


def run_plan(
    plan: tuple[Part, ...],
    results: Path,
    *,
    is_rehearsal: bool,
    vllm_python: Path,
    kept: dict[str, Row] | None = None,
) -> dict[str, Any]:
    """Run the parts one after another; the file is written after each.

    Args:
        plan: The parts.
        results: The file.
        is_rehearsal: Whether they run on the CPU, at small shapes.
        vllm_python: The interpreter of vLLM's part.
        kept: Parts that are recorded already, by name; those of the plan replace them.
    """
    limits = [part.rehearsed if is_rehearsal else part.seconds for part in plan]
    deadline = time.monotonic() + sum(limits)
    found = {"machine": facts(), "rehearsal": is_rehearsal, "parts": dict(kept or {})}
    results.parent.mkdir(parents=True, exist_ok=True)
    for place, part in enumerate(plan):
        limit = deadline - time.monotonic() - sum(limits[place + 1 :])
        print(f"{part.name}: at most {limit:.0f} s", flush=True)
        found["parts"][part.name] = run_part(part, limit, is_rehearsal, vllm_python)
        results.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print("\n".join(describe(part, found["parts"][part.name])), flush=True)
    return found


def run_part(part: Part, limit: float, is_rehearsal: bool, vllm_python: Path) -> Row:
    """Run a part in a process of its own, which is ended with all of its own at the limit."""
    python = sys.executable
    if part.name == "vllm":
        if vllm_python.is_file():
            python = str(vllm_python)
        elif importlib.util.find_spec("vllm") is None:
            return _outcome("skipped", 0.0, limit, f"vLLM is not installed here, nor {vllm_python}")

    log = ROOT / "out" / f"gpu-{part.name}.log"
    log.parent.mkdir(exist_ok=True)
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    if is_rehearsal:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with TemporaryDirectory() as scratch, log.open("wb") as output:
        file = Path(scratch) / "part.json"
        command = [python, __file__, "--part", part.name, "--into", str(file)]
        began = time.monotonic()
        process = subprocess.Popen(
            [*command, *(["--rehearse"] if is_rehearsal else [])],
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            state = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "timed out"
        finally:
            with_all_of_its_own(process)
        seconds = time.monotonic() - began
        recorded = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    reason = recorded.get("skipped")
    if reason is not None:
        state = "skipped"
    elif state == "failed":
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = _first_line(lines[-1] if lines else "it wrote nothing")
    elif state == "timed out":
        reason = f"it was ended after {limit:.0f} s"
    return _outcome(state, seconds, limit, reason) | {
        "rows": recorded.get("rows", []),
        "notes": recorded.get("notes", []),
    }


def with_all_of_its_own(process: "subprocess.Popen[bytes]") -> None:
    """End a process and what it started, and wait for it."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(state: str, seconds: float, limit: float, reason: str | None) -> Row:
    return {
        "state": state,
        "reason": reason,
        "seconds": round(seconds, 1),
        "limit": round(limit, 1),
        "rows": [],
        "notes": [],
    }


def facts() -> dict[str, Any]:
    """Return what the figures depend on: machine, GPU and packages."""
    import torch
    from _machine import machine

    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu: dict[str, Any] = {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "gpu": properties.name,
            "gpu_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return machine() | gpu | {"packages": packages}


# Reports.


def describe(part: Part, found: Row) -> list[str]:
    """Return a part's outcome as Markdown: its title, state, table and notes."""
    ended = f"{found['state']} after {found['seconds']:.0f} s"
    if found["reason"]:
        ended += f": {found['reason']}"
    lines = [f"**{part.title}** (`{part.name}`, {ended})", ""]
    if found["rows"]:
        lines += [*TABLES[part.name](found["rows"]), ""]
    return lines + [f"* {note}" for note in found["notes"]] + ([""] if found["notes"] else [])


def _table(head: str, rows: list[str]) -> list[str]:
    columns = head.count("|") - 1
    return [head, "|" + "---|" * columns, *rows]


def _tests_table(rows: list[Row]) -> list[str]:
    return _table(
        "| tests | passed | failed | skipped |",
        [
            f"| {row['tests']} | {row['passed']} | {row['failures'] + row['errors']} "
            f"| {row['skipped']} |"
            for row in rows
        ],
    )


def _loss_table(rows: list[Row]) -> list[str]:
    ours = {row["dtype"]: row for row in rows if row["method"] == "ours"}
    lines = []
    for row in rows:
        base = ours.get(row["dtype"], row)
        lines.append(
            f"| {row['T']} | {row['V']} | {row['H']} | {row['dtype']} | {row['method']} "
            f"| {1000 * row['seconds']:.1f} | {row['seconds'] / base['seconds']:.2f} "
            f"| {row['mib']:.0f} | {row['mib'] / base['mib']:.2f} "
            f"| {row['loss'] / base['loss'] - 1:+.1e} |"
        )
    return _table(
        "| T | V | H | dtype | method | ms | ours = 1 | extra MiB | ours = 1 | loss, off ours |",
        lines,
    )


def _training_table(rows: list[Row]) -> list[str]:
    return _table(
        "| variant | parameters | tokens | ms a step | SFT = 1 | of it optimizer, ms | peak MiB |",
        [
            f"| {row['variant']} | {row['parameters']:,} | {row['tokens']} "
            f"| {1000 * row['seconds']:.1f} | {row['to_sft']:.2f} | {1000 * row['optimizer']:.1f} "
            f"| {row['mib']:.0f} |"
            for row in rows
        ],
    )


def _decode_table(rows: list[Row]) -> list[str]:
    return _table(
        "| batch | method | ms a step | tokens/s | time to plain | prefill to plain "
        "| memory to plain |",
        [
            f"| {row['batch']} | {row['method']} | {row['ms_per_step']:.1f} "
            f"| {row['tokens_per_second']:.0f} | {row['to_plain']:.2f} "
            f"| {row['prefill_to_plain']:.2f} | {row['memory_to_plain']:.2f} |"
            for row in rows
        ],
    )


def _vllm_table(rows: list[Row]) -> list[str]:
    mixes = [row for row in rows if row["kind"] == "mix"]
    speeds = [row for row in rows if row["kind"] == "throughput"]
    lines = _table(
        "| dial | requests | λ | runner | CUDA graphs | log-probability, largest error "
        "| below the likeliest token, at most |",
        [
            f"| {row['dial']} | {row['requests']} | {', '.join(f'{lam:g}' for lam in row['lambdas'])} "
            f"| {row['runner']} | {row['cuda_graphs']} | {row['error']:.1e} | {row['regret']:.1e} |"
            for row in mixes
        ],
    )
    if speeds:
        lines += [
            "",
            *_table(
                "| row | dial | runner | CUDA graphs | plain, tokens/s | dial, tokens/s "
                "| dial to plain (least–largest) |",
                [
                    f"| {row['row']} | {row['dial']} | {row['runner']} | {row['cuda_graphs']} "
                    f"| {row['plain_tokens_per_second']:.1f} | {row['tokens_per_second']:.1f} "
                    f"| {row['ratio']:.2f} ({row['range'][0]:.2f}–{row['range'][1]:.2f}) |"
                    for row in speeds
                ],
            ),
        ]
    return lines


TABLES = {
    "tests": _tests_table,
    "loss": _loss_table,
    "training": _training_table,
    "decode": _decode_table,
    "vllm": _vllm_table,
}


def section(path: Path = RESULTS) -> str:
    """Return the section of docs/results.md; that nothing was measured, if there is no file."""
    if not path.exists():
        return (
            "Not measured: `make gpu` has not been run on a GPU, and all figures here are of CPUs. It "
            "takes eight minutes at most, and writes its tables to this place.\n"
        )
    found = json.loads(path.read_text(encoding="utf-8"))
    here = found["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in here["packages"].items())
    lines = [
        f"`make gpu`: {here.get('gpu', 'no GPU')}, {here.get('gpu_gib', 0):g} GiB, CUDA "
        f"{here.get('cuda')}; {packages}. What is measured: the head of `benchmarks/gpu.py`.",
        "",
    ]
    for part in PLAN:
        if part.name in found["parts"]:
            lines += describe(part, found["parts"][part.name])
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    names = [part.name for part in PLAN]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of the figures")
    parser.add_argument(
        "--vllm-python",
        type=Path,
        default=ROOT / ".venv-vllm" / "bin" / "python",
        help="the Python that has vLLM, if it is not this one",
    )
    parser.add_argument("--rewrite", action="store_true", help="only docs/results.md")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, also beside a GPU")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from _document import put_section

    if arguments.part:  # in a process of its own
        [part] = [part for part in PLAN if part.name == arguments.part]
        part.run(Recorder(arguments.into), arguments.rehearse)
        return
    if arguments.rewrite:
        put_section("gpu", section())
        return

    import torch

    results, is_rehearsal = arguments.results, arguments.rehearse
    if not torch.cuda.is_available():
        print(
            "There is no GPU here that torch can use: this is a rehearsal on the CPU.", flush=True
        )
        is_rehearsal = True
    if is_rehearsal:
        results = REHEARSAL if results == RESULTS else results
    plan = tuple(part for part in PLAN if part.name in arguments.parts)
    kept = {}
    if len(plan) < len(PLAN) and results.exists():
        kept = json.loads(results.read_text(encoding="utf-8"))["parts"]
    run_plan(plan, results, is_rehearsal=is_rehearsal, vllm_python=arguments.vllm_python, kept=kept)
    if results == RESULTS:
        put_section("gpu", section())
    print(f"The figures: {results}")


if __name__ == "__main__":
    main()
