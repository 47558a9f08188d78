"""A training step beside plain fine-tuning and a peer's distillation: seconds and peak memory.

Run it from the repository, after `make smollm2`:

    python benchmarks/training.py             # about ten minutes on two cores
    python benchmarks/training.py --quick     # a model of two layers, seconds; nothing written
    python benchmarks/training.py --variants SFT GKD "TrRa online"    # some; nothing written

Variants, all of SmolLM2-135M in float32 with AdamW, on the same rows:

* ``SFT``: TRL's SFTTrainer, all weights;
* ``TrRa online``: student, reference and aligned model in memory, all weights trained;
* ``TrRa cached``: the teachers' hidden states out of a cache that was made before;
* ``GKD``: TRL's GKDTrainer without on-policy samples: one teacher in memory, the same reverse KL;
* ``LoRA SFT``: SFTTrainer with a LoRA;
* ``LoRA TrRa, shared base``: the aligned model an adapter, one base for all three.

Every variant runs in a process of its own, and they take turns step by step: a busy machine slows a
step of all of them down together, so ratios are taken between the steps of one turn, and what is
reported is their median. A step's time is CPU time of one thread. One step in five is logged, as in
the recipes, and what is computed for the log has its share: a step's cost is that of four steps
without a log line and of one with it. The first step is left out. Memory is the growth of the
resident set from before the models are loaded to its peak, by the kernel's high-water mark.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from _machine import MIB, machine, peak_growth, work_seconds
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from flexalign.data import data_fingerprint
from flexalign.models.loading import fingerprint, load_model, load_tokenizer
from flexalign.models.pair import ModelPair
from flexalign.training import TrRaConfig, TrRaTrainer
from flexalign.training.hidden_cache import Form, identity_of, prepare_documents, write_cache

RESULTS = Path(__file__).parent / "results"
LAM = 2.0
LOGGING_STEPS = 5
STEPS = 2 * LOGGING_STEPS
"""How often the variants take turns."""
CHUNK = 256
TARGETS = {
    "cached ÷ SFT, seconds without the optimizer": 1.15,
    "online ÷ SFT, seconds without the optimizer": 1.75,
    "online ÷ GKD, seconds": 1.0,
    "shared base ÷ (LoRA SFT + one head product), memory": 1.1,
}


TINY = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
"""The model of `--quick`."""


@dataclass(frozen=True)
class Setup:
    """What every variant trains on.

    Attributes:
        folder: The models' folder, and that of what is written.
        tokens: Tokens of a row.
        prompt: Those of them that are given.
        device: ``cpu``, in float32, or ``cuda``, in bfloat16 by autocast.
        vocabulary: Ids of the rows are below it.
    """

    folder: Path
    tokens: int = 256
    prompt: int = 64
    device: str = "cpu"
    vocabulary: int = 49000


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of so many words: a pair's logits are cut to what its tokenizer has."""
    words = models.WordLevel({f"t{token}": token for token in range(size)}, unk_token="t2")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token="t0", pad_token="t1", unk_token="t2"
    )


def write_models(folder: Path, shape: dict[str, Any] | None, tokenizer_of: str | None) -> None:
    """A reference, an aligned model near it, and an adapter on the reference with an effect.

    Args:
        folder: Where they are written.
        shape: Fields of a Llama with random weights; SmolLM2-135M if None.
        tokenizer_of: The model whose tokenizer goes with them; one of as many words as the shape
            has tokens if None.
    """
    if shape is not None:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape))
    else:
        model = load_model("smollm2", dtype=torch.float32)
    if tokenizer_of is not None:
        tokenizer = load_tokenizer(tokenizer_of)
    else:
        tokenizer = word_tokenizer(model.config.vocab_size)
    torch.manual_seed(0)
    model.save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")
    adapter = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    adapter.peft_config["default"].base_model_name_or_path = str(folder / "reference")
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    adapter.save_pretrained(folder / "adapter")
    merged = adapter.merge_and_unload()
    merged.save_pretrained(folder / "aligned")
    tokenizer.save_pretrained(folder / "aligned")


def make_rows(setup: Setup) -> Dataset:
    """Rows of random tokens, of which the first ones are given; one row for each step."""
    generator = torch.Generator().manual_seed(0)
    size = (STEPS, setup.tokens)
    rows = torch.randint(10, setup.vocabulary, size, generator=generator).tolist()
    given = setup.prompt
    return Dataset.from_list(
        [{"input_ids": ids, "labels": [-100] * given + ids[given:]} for ids in rows]
    )


def settings(setup: Setup, kind: Any = SFTConfig, **options: Any) -> Any:
    return kind(
        output_dir=str(setup.folder / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=1e-5,
        max_length=setup.tokens,
        save_strategy="no",
        logging_steps=LOGGING_STEPS,
        report_to="none",
        use_cpu=setup.device == "cpu",
        bf16=setup.device != "cpu",
        dataloader_pin_memory=False,
        **options,
    )


def cached(folder: Path) -> dict[str, str]:
    return {"teacher": "cached", "cache_dir": str(folder / "cache")}


def make_cache(setup: Setup) -> None:
    folder = setup.folder
    rows, tokenizer = make_rows(setup), load_tokenizer(folder / "reference")
    args = settings(setup, TrRaConfig)
    config = AutoConfig.from_pretrained(folder / "reference")
    float32 = torch.float32
    form = Form((config.hidden_size,) * 2, config.vocab_size, False, float32, float32)
    prints = (fingerprint(folder / "reference"), fingerprint(folder / "aligned"))
    write_cache(
        Path(cached(folder)["cache_dir"]),
        identity_of(prints, data_fingerprint(rows), tokenizer, args),
        lambda: prepare_documents(rows, tokenizer, args),
        lambda: ModelPair.load(folder / "reference", folder / "aligned", dtype=float32),
        form=form,
    )


class Clock(TrainerCallback):
    """Seconds of every step and of the optimizer's part in it; it waits for its turn."""

    def __init__(self, mine: Any, following: Any, device: str) -> None:
        self.mine, self.following, self.device = mine, following, device
        self.seconds: list[float] = []
        self.optimizer: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mine.acquire()
        self._began = work_seconds(self.device)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._updating = work_seconds(self.device)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._updated = work_seconds(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(work_seconds(self.device) - self._began)
        self.optimizer.append(self._updated - self._updating)
        self.following.release()


def sft(setup: Setup, **options: Any) -> Any:
    model = load_model(setup.folder / "reference", dtype=torch.float32)
    tokenizer = load_tokenizer(setup.folder / "reference")
    return SFTTrainer(
        model=model,
        args=settings(setup),
        train_dataset=make_rows(setup),
        processing_class=tokenizer,
        **options,
    )


def trra(setup: Setup, aligned: str, *, from_cache: bool, **options: Any) -> Any:
    folder = setup.folder
    extra = cached(folder) if from_cache else {}
    return TrRaTrainer(
        reference=folder / "reference",
        aligned=folder / aligned,
        args=settings(setup, TrRaConfig, lam=LAM, chunk_size=CHUNK, **extra),
        train_dataset=make_rows(setup),
        processing_class=load_tokenizer(folder / "reference"),
        **options,
    )


def gkd(setup: Setup) -> Any:
    folder = setup.folder
    tokenizer = load_tokenizer(folder / "reference")
    return GKDTrainer(
        model=load_model(folder / "reference", dtype=torch.float32),
        teacher_model=load_model(folder / "aligned", dtype=torch.float32),
        args=settings(setup, GKDConfig, lmbda=0.0, beta=1.0),
        data_collator=DataCollatorForLanguageModeling(tokenizer.pad_token_id or 0),
        train_dataset=make_rows(setup),
        processing_class=tokenizer,
    )


def _lora() -> LoraConfig:
    return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


VARIANTS: dict[str, Callable[[Setup], Any]] = {
    "SFT": sft,
    "TrRa online": lambda setup: trra(setup, "aligned", from_cache=False),
    "TrRa cached": lambda setup: trra(setup, "aligned", from_cache=True),
    "GKD": gkd,
    "LoRA SFT": lambda setup: sft(setup, peft_config=_lora()),
    "LoRA TrRa, shared base": lambda setup: trra(
        setup, "adapter", from_cache=False, peft_config=_lora()
    ),
}


Run = dict[str, Any]


def run(name: str, setup: Setup, threads: int, mine: Any, following: Any, answers: Any) -> None:
    """Load one variant, take its steps in turn, and send their seconds and the peak memory."""
    torch.set_num_threads(threads)
    clock = Clock(mine, following, setup.device)
    try:
        with peak_growth(setup.device) as grown:
            trainer = VARIANTS[name](setup)
            trainer.add_callback(clock)
            trainer.train()
    except BaseException as error:
        answers.put((name, error))  # or the others would wait for their turn for ever
        raise
    one = {"seconds": clock.seconds, "optimizer": clock.optimizer, "mib": grown["mib"]}
    answers.put((name, one))


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Fork: what was imported is there, and no memory but that."""
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def measure(setup: Setup, threads: int, names: list[str]) -> dict[str, Run]:
    """Let the variants take turns, step by step."""
    # A process that is forked cannot use a GPU if something has asked for one before.
    context = multiprocessing.get_context("fork" if setup.device == "cpu" else "spawn")
    turns = [context.Semaphore(int(place == 0)) for place in range(len(names))]
    answers = context.Queue()
    started = [
        context.Process(target=run, args=(name, setup, threads, *turn, answers), daemon=True)
        for name, *turn in zip(names, turns, [*turns[1:], turns[0]], strict=True)
    ]
    for process in started:
        process.start()

    found: dict[str, Run] = {}
    for _ in started:
        name, one = answers.get()
        if isinstance(one, BaseException):
            raise RuntimeError(f"{name} failed") from one
        found[name] = one
    return {name: found[name] for name in names}


def split(values: list[float]) -> tuple[list[float], list[float]]:
    """The steps without a log line, less the first, and those with one."""
    numbered = list(enumerate(values, start=1))[1:]
    return (
        [value for step, value in numbered if step % LOGGING_STEPS],
        [value for step, value in numbered if not step % LOGGING_STEPS],
    )


def over_a_period(values: list[float]) -> float:
    """The mean over a period of the log, of medians."""
    plain, logged = map(statistics.median, split(values))
    return ((LOGGING_STEPS - 1) * plain + logged) / LOGGING_STEPS


def without_optimizer(run: Run) -> list[float]:
    return [all_ - part for all_, part in zip(run["seconds"], run["optimizer"], strict=True)]


def turn_by_turn(one: list[float], other: list[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def ratios(found: dict[str, Run], setup: Setup, vocab_size: int) -> dict[str, float]:
    """The figures that the targets are about."""
    product = min(CHUNK, setup.tokens - setup.prompt) * vocab_size * 4 / MIB
    work = {name: without_optimizer(run) for name, run in found.items()}
    steps = {name: run["seconds"] for name, run in found.items()}
    values = (
        over_a_period(turn_by_turn(work["TrRa cached"], work["SFT"])),
        over_a_period(turn_by_turn(work["TrRa online"], work["SFT"])),
        over_a_period(turn_by_turn(steps["TrRa online"], steps["GKD"])),
        found["LoRA TrRa, shared base"]["mib"] / (found["LoRA SFT"]["mib"] + product),
    )
    return dict(zip(TARGETS, values, strict=True))


def table(found: dict[str, Run]) -> list[str]:
    base = found["SFT"]
    lines = [
        "| variant | CPU seconds per step | SFT = 1 | of it without a log line | with one | "
        "of it optimizer | peak MiB | SFT = 1 |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, one in found.items():
        relative = turn_by_turn(one["seconds"], base["seconds"])
        plain, logged = map(statistics.median, split(relative))
        lines.append(
            f"| {name} | {over_a_period(one['seconds']):.2f} | {over_a_period(relative):.2f} | "
            f"{plain:.2f} | {logged:.2f} | {statistics.median(one['optimizer']):.2f} | "
            f"{one['mib']:.0f} | {one['mib'] / base['mib']:.2f} |"
        )
    return lines


def report(
    found: dict[str, Run], reached: dict[str, float], setup: Setup, facts: dict[str, Any]
) -> str:
    lines = [
        "# A training step",
        "",
        f"`python benchmarks/training.py`: SmolLM2-135M, float32, {facts['threads']} thread of "
        f"{facts['cpu']}, torch {facts['torch']}. One row of {setup.tokens} tokens in a step, {setup.prompt} of "
        f"them the prompt; AdamW, activation checkpointing as TRL sets it, λ = {LAM:g}, reverse "
        f"KL. {STEPS} steps of each variant, in turns, the first left out; one step in "
        f"{LOGGING_STEPS} is logged. Ratios are the medians of those within a turn. Memory is the peak "
        "above what the imports hold. The optimizer's seconds are those of any number of rows, so the "
        "ratios to SFT that are to be reached leave them out. SFT's step includes the entropy and the "
        "accuracy that TRL logs of every batch, TrRa's logged step the two KL that it logs.",
        "",
        *table(found),
        "",
        "| ratio | measured | to reach |",
        "| --- | --: | --: |",
        *(f"| {name} | {reached[name]:.2f} | ≤ {limit} |" for name, limit in TARGETS.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, nothing written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bars()
    with TemporaryDirectory() as folder:
        setup = Setup(Path(folder))
        in_own_process(write_models, setup.folder, TINY if arguments.quick else None, "smollm2")
        if "TrRa cached" in arguments.variants:
            in_own_process(make_cache, setup)
        found = measure(setup, arguments.threads, arguments.variants)
        config = json.loads((Path(folder) / "reference" / "config.json").read_text())
    if set(arguments.variants) != set(VARIANTS):
        print("\n".join(table(found)))
        return
    reached = ratios(found, setup, config["vocab_size"])
    facts = machine() | {"threads": arguments.threads}
    text = report(found, reached, setup, facts)
    print(text)
    if arguments.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "training.md").write_text(text, encoding="utf-8")
    (RESULTS / "training.json").write_text(
        json.dumps(
            {"machine": facts, "variants": found, "ratios": reached},
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
