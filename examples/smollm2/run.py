"""A real model: SmolLM2-135M, a concise version of it, students at several λ, and one LoRA for all.

    python examples/smollm2/run.py --data instructions.json            # two hours of one core
    python examples/smollm2/run.py --data instructions.json --quick    # some minutes

Stages whose result is there are passed over, so a run that was broken off goes on where it stopped.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from align import train_aligned
from concise import read_rows, split, write_rows
from report import make_report

HERE = Path(os.path.relpath(Path(__file__).parent))
SEED = 0


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        held_out: Prompts of the measurements.
        traces: Prompts of the traces that the students learn from.
        trace_tokens: Where a trace is cut off.
        aligned_steps: Steps of the aligned model's training.
        realign_steps: Steps of each student's training.
        dial_steps: Steps of the training of the LoRA dial, which serves every λ.
        answer_tokens: Where a measured answer is cut off.
        lams: λ of the students.
        dial_lams: λ at which the LoRA dial is measured; it is trained from 0 to the largest.
    """

    held_out: int
    traces: int
    trace_tokens: int
    aligned_steps: int
    realign_steps: int
    dial_steps: int
    answer_tokens: int
    lams: tuple[float, ...]
    dial_lams: tuple[float, ...]


FULL = Sizes(64, 192, 96, 48, 24, 96, 256, (0.5, 1.0, 2.0), (0.5, 1.0, 1.5, 2.0))
QUICK = Sizes(24, 48, 64, 20, 12, 24, 128, (2.0,), (2.0,))


def main() -> None:
    """Run what is missing and write the report."""
    options = parse_arguments(__doc__, Path("out/smollm2"), quick="small sizes, λ = 2 alone")
    sizes = QUICK if options.quick else FULL
    reference, output = options.reference, options.output
    output.mkdir(parents=True, exist_ok=True)
    claim(output, {"reference": reference, "seed": SEED, **asdict(sizes)})
    start = time.monotonic()
    with stage("split the data"):
        _split(options.data, output, sizes)
    with stage("train the aligned model"):
        _align(reference, output, sizes)
    with stage("make traces with the reference"):
        _make_traces(reference, output, sizes)
    models = {"reference": reference, "aligned": output / "aligned" / "merged"}
    for lam in sizes.lams:
        with stage(f"realign at λ = {lam:g}"):
            _realign(reference, lam, output, sizes)
        models[f"lambda={lam:g}"] = output / f"lambda={lam:g}" / "merged"
    with stage(f"train one LoRA for every λ up to {max(sizes.dial_lams):g}"):
        _train_dial(reference, output, sizes)
    for name, model in models.items():
        with stage(f"answers of {name}"):
            _answer(name, output, sizes, model)
    for lam in sizes.dial_lams:
        name = f"dial-lambda={lam:g}"
        with stage(f"answers of the LoRA dial at λ = {lam:g}"):
            _answer(name, output, sizes, reference, "--adapter", output / "dial", "--lambda", lam)
    with stage("measure"):
        make_report(output, reference, sizes.lams, sizes.dial_lams)
    print(f"\n{output / 'report.md'}; {(time.monotonic() - start) / 60:.1f} minutes")


def parse_arguments(about: str, output: Path, quick: str) -> argparse.Namespace:
    """Read what both examples are told on the command line."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("FLEXALIGN_DATA"),
        help="prompts with answers, such as an Alpaca file (default: $FLEXALIGN_DATA)",
    )
    parser.add_argument("--output", type=Path, default=output, help="%(default)s")
    parser.add_argument("--reference", default="smollm2", help="known name or folder: %(default)s")
    parser.add_argument("--quick", action="store_true", help=quick)
    options = parser.parse_args()
    if options.data is None:
        parser.error("name an instruction file with --data, or in $FLEXALIGN_DATA")
    return options


def claim(output: Path, settings: dict[str, object]) -> None:
    """Keep runs of different sizes out of one folder."""
    path = output / "settings.json"
    text = json.dumps(settings, indent=2) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        sys.exit(f"error: {output} holds a run with other settings; name another --output.")
    path.write_text(text, encoding="utf-8")


def _split(data: Path, output: Path, sizes: Sizes) -> None:
    parts = split(data, held_out=sizes.held_out, seed=SEED)
    write_rows(output / "held_out.jsonl", parts.held_out)
    write_rows(output / "prompts.jsonl", parts.prompts[: sizes.traces])
    write_rows(output / "concise.jsonl", parts.concise)


def _align(reference: str, output: Path, sizes: Sizes) -> None:
    if (output / "aligned").exists():
        return
    rows = read_rows(output / "concise.jsonl")
    train_aligned(reference, rows, HERE / "aligned.yaml", output / "aligned", sizes.aligned_steps)


def _make_traces(reference: str, output: Path, sizes: Sizes) -> None:
    flexalign(
        *("sample", reference, "--prompts", output / "prompts.jsonl"),
        *("--output", output / "traces.jsonl", "--max-new-tokens", sizes.trace_tokens),
        *("--batch-size", 48, "--seed", SEED),
    )


def _realign(reference: str, lam: float, output: Path, sizes: Sizes) -> None:
    target = output / f"lambda={lam:g}"
    _train("realign.yaml", f"{lam:g}", target, reference, sizes.realign_steps)


def _train_dial(reference: str, output: Path, sizes: Sizes) -> None:
    permitted = f"0:{max(sizes.dial_lams):g}"
    _train("lora_dial.yaml", permitted, output / "dial", reference, sizes.dial_steps)


def _train(recipe: str, lam: str, target: Path, reference: str, steps: int) -> None:
    settings = {
        "reference": reference,
        "aligned": target.parent / "aligned",
        "data": target.parent / "traces.jsonl",
        "training.max_steps": steps,
    }
    assignments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    flexalign("realign", HERE / recipe, "--lambda", lam, "--output", target, *assignments)


def _answer(name: str, output: Path, sizes: Sizes, model: str | Path, *dial: object) -> None:
    flexalign(
        *("sample", model, *dial, "--prompts", output / "held_out.jsonl"),
        *("--output", output / "answers" / f"{name}.jsonl"),
        *("--max-new-tokens", sizes.answer_tokens, "--temperature", 0.7, "--top-p", 0.95),
        *("--batch-size", 40, "--seed", SEED),
    )


def flexalign(*arguments: object) -> None:
    """Run one of the library's commands, as a user would."""
    words = [str(argument) for argument in arguments]
    print("$", shlex.join(["flexalign", *words]), flush=True)
    code = subprocess.run([Path(sys.executable).with_name("flexalign"), *words]).returncode
    if code:
        sys.exit(code)


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Say what is done, and afterwards how long it took."""
    print(f"\n== {title}", flush=True)
    start = time.monotonic()
    yield
    print(f"   {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
