"""One LoRA over a range of λ: every row's student and teacher at its own λ."""

import copy
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from flexalign import realign
from flexalign.errors import ConfigError, LambdaError, UnsupportedModelError
from flexalign.models.loading import fingerprint, load_model
from flexalign.systems.dials import load_dial
from flexalign.training import Stopped, TrRaConfig
from flexalign.training.draws import draw_shares
from twin import divergence64

from .conftest import VOCAB, Modules, lora, lora_state, make_rows
from .test_trainer import assert_same

RANGE = {"low": -0.5, "high": 3.0}
# With B at zero, where PEFT starts, no gradient would reach A.
STARTED = {"init_lora_weights": False, "r": 4}


@pytest.fixture
def dial_trainer(make_trainer: Callable[..., Any], modules: Modules) -> Callable[..., Any]:
    """A trainer of one LoRA on the reference over `RANGE`."""

    def make(rows: Dataset | None = None, **options: Any) -> Any:
        models = {"reference": copy.deepcopy(modules.reference), "aligned": modules.aligned}
        given = {"lam": RANGE, "models": models, "peft_config": lora(**STARTED), **options}
        return make_trainer(rows, **given)

    return make


def record(trainer: Any) -> dict[tuple[int, ...], float]:
    """Record the λ of every document that the trainer takes, by its tokens."""
    found: dict[tuple[int, ...], float] = {}
    compute = trainer.compute_loss

    def recorded(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        for document, lam in documents(inputs):
            found[tuple(document.tolist())] = lam
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = recorded
    return found


def documents(inputs: dict[str, Any]) -> list[tuple[Tensor, float]]:
    ids, lams = inputs["input_ids"], inputs["lambda"]
    if "position_ids" not in inputs:
        lengths = inputs["attention_mask"].sum(1)
        return [(row[:n], float(lam)) for row, n, lam in zip(ids, lengths, lams, strict=True)]
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], ids.shape[1]]
    return [(ids[0, a:b], float(lams[0, a])) for a, b in zip(starts, ends, strict=True)]


def naive_loss(
    student: PeftModel,
    reference: torch.nn.Module,
    aligned: torch.nn.Module,
    rows: Dataset,
    lams: dict[tuple[int, ...], float],
    divergence: str = "reverse",
    gate: float | None = None,
) -> Tensor:
    """Equation 6 row by row in float64; the student is PEFT's own with another `scaling`."""
    layers = [module for module in student.modules() if isinstance(module, LoraLayer)]
    stock = [layer.scaling["default"] for layer in layers]
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids, lam = torch.tensor(row["input_ids"]), lams[tuple(row["input_ids"])]
        mask = torch.tensor(row["labels"])[1:] != -100
        for layer, scaling in zip(layers, stock, strict=True):
            layer.scaling["default"] = scaling * lam
        with torch.no_grad():
            r, a = (m(input_ids=ids[None]).logits[0, :-1, :VOCAB] for m in (reference, aligned))
        s = student(input_ids=ids[None]).logits[0, :-1, :VOCAB]
        at = torch.full(s.shape[:1], lam, dtype=torch.float64)
        if gate is not None:
            far = 0.5 * (r.softmax(-1) - a.softmax(-1)).abs().sum(-1) > gate
            at = torch.where(far, at, at.clamp(0, 1))
        teacher = at[:, None] * a + (1 - at[:, None]) * r
        losses = divergence64(s, teacher, divergence, 0.5)
        total, count = total + losses[mask].sum(), count + int(mask.sum())
    for layer, scaling in zip(layers, stock, strict=True):
        layer.scaling["default"] = scaling
    return total / count


def one_step(
    trainer: Any, reference: PreTrainedModel, aligned: PreTrainedModel, rows: Dataset, **twin: Any
) -> dict[tuple[int, ...], float]:
    """Take a step of SGD at rate 1, compare loss and gradients with the twin's; return the λ's."""
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    student = copy.deepcopy(trainer.model)
    for module in student.modules():  # the copies of the hooks would scale a second time
        module._forward_pre_hooks.clear()
    student = student.double().eval()
    lams = record(trainer)
    trainer.train()

    sides = [copy.deepcopy(model).double().eval() for model in (reference, aligned)]
    loss = naive_loss(student, *sides, rows, lams, **twin)
    loss.backward()
    expected = {
        n: p.grad for n, p in student.named_parameters() if p.grad is not None and "default" in n
    }
    assert expected
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    taken = {n: before[n] - p.detach() for n, p in trainer.model.named_parameters()}
    assert_same({n: taken[n] for n in expected}, expected)
    log = trainer.state.log_history[0]
    assert log["divergence"] == pytest.approx(float(loss.detach()), rel=1e-4)
    tokens = {tuple(row["input_ids"]): sum(x != -100 for x in row["labels"][1:]) for row in rows}
    mean = sum(lams[ids] * n for ids, n in tokens.items()) / sum(tokens.values())
    assert log["lambda"] == pytest.approx(mean, rel=1e-5)
    return lams


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": 0.2},
        {"divergence": "forward"},
        {"divergence": "jsd"},
        {"activation_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"packing": True, "max_length": 64, "per_device_train_batch_size": 4},
        {"padding_free": True, "max_length": None},
        {"chunk_size": 3},
    ],
    ids=str,
)
def test_student_and_teacher_are_at_the_rows_lambda(
    dial_trainer: Callable[..., Any], modules: Modules, options: dict[str, Any]
) -> None:
    rows = make_rows(8)
    trainer = dial_trainer(rows, **options)
    twin = {name: options[name] for name in ("divergence", "gate") if name in options}
    lams = one_step(trainer, *modules, rows, **twin)
    assert len(set(lams.values())) == 8
    if "position_ids" not in trainer.get_train_dataloader().collate_fn([rows[0]]):
        shares = sorted((lam + 0.5) / 3.5 for lam in lams.values())
        assert [int(8 * share) for share in shares] == list(range(8))


def test_only_the_students_adapter_is_scaled(
    make_trainer: Callable[..., Any], adapter_folder: tuple[Path, Path]
) -> None:
    base, adapter = adapter_folder
    rows = make_rows(8)
    trainer = make_trainer(
        rows,
        models={"reference": str(base), "aligned": str(adapter)},
        peft_config=lora(**STARTED),
        lam=RANGE,
    )
    held = {
        id(teacher.model) for teacher in (trainer.objective.reference, trainer.objective.aligned)
    }
    assert held == {id(trainer.model)}  # one base in memory
    aligned = AutoPeftModelForCausalLM.from_pretrained(adapter)
    one_step(trainer, load_model(str(base)), aligned, rows)


def test_thirds_of_the_range_make_up_the_divergence(
    dial_trainer: Callable[..., Any], modules: Modules
) -> None:
    rows = make_rows(8)
    trainer = dial_trainer(rows, lam={"low": 0, "high": 3})
    student = copy.deepcopy(trainer.model)
    for module in student.modules():
        module._forward_pre_hooks.clear()
    lams = record(trainer)
    trainer.train()
    log = trainer.state.log_history[0]
    sides = [copy.deepcopy(model).double().eval() for model in modules]
    for third, name in enumerate(("low", "middle", "high")):
        chosen = [row for row in rows if int(lams[tuple(row["input_ids"])]) == third]
        loss = naive_loss(student.double().eval(), *sides, chosen, lams)
        assert log[f"divergence_{name}"] == pytest.approx(float(loss.detach()), rel=1e-4)


def test_an_evaluation_measures_every_row_in_each_third(
    dial_trainer: Callable[..., Any], modules: Modules
) -> None:
    rows = make_rows(6)
    trainer = dial_trainer(rows, lam={"low": 0, "high": 3}, eval_dataset=rows)
    student = copy.deepcopy(trainer.model)
    for module in student.modules():
        module._forward_pre_hooks.clear()
    found = trainer.evaluate()
    sides = [copy.deepcopy(model).double().eval() for model in modules]
    losses = []
    for name, lam in (("low", 0.5), ("middle", 1.5), ("high", 2.5)):
        lams = {tuple(row["input_ids"]): lam for row in rows}
        losses.append(float(naive_loss(student.double().eval(), *sides, rows, lams).detach()))
        logged = trainer.state.log_history[-1]
        assert logged[f"eval_divergence_{name}"] == pytest.approx(losses[-1], rel=1e-4)
    assert found["eval_loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert trainer.scale.lam is None  # the stock strength again


def test_the_student_is_at_its_stock_strength_after_a_step(
    dial_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = dial_trainer()
    trainer.train()
    ids = torch.arange(10, 30)[None]
    trainer.save_model(tmp_path / "dial")
    plain = PeftModel.from_pretrained(load_base(trainer), tmp_path / "dial").eval()
    found = trainer.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, plain(input_ids=ids).logits)


def load_base(trainer: Any) -> Any:
    return copy.deepcopy(trainer.model).unload()


def test_the_folder_is_a_plain_lora_of_lambda_1_and_a_dial(
    make_trainer: Callable[..., Any], adapter_folder: tuple[Path, Path], tmp_path: Path
) -> None:
    base, aligned = adapter_folder
    trainer = make_trainer(
        models={"reference": str(base), "aligned": str(aligned)},
        peft_config=lora(**STARTED),
        lam={"low": 2, "high": 3},
        gate=0.1,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    settings = json.loads((checkpoint / "lora_dial.json").read_text())
    assert settings["lambda_range"] == [2.0, 3.0]
    assert settings["default_lambda"] == 2.0  # the end that is nearest to 1
    assert settings["gate"] == 0.1
    assert settings["base"] == str(base)
    assert settings["base_fingerprint"] == fingerprint(str(base))
    plain = AutoPeftModelForCausalLM.from_pretrained(checkpoint).eval()
    ids = torch.arange(10, 30)[None]
    with trainer.at_lambda(1.0):
        expected = trainer.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(plain(input_ids=ids).logits, expected)


class _StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"packing": True, "max_length": 48, "per_device_train_batch_size": 1},
        {"rollouts": 0.5, "max_length": 30},
        {"shared": True},
    ],
    ids=["padded", "packed", "rollouts", "shared"],
)
def test_stopped_and_resumed_is_uninterrupted(
    make_trainer: Callable[..., Any],
    modules: Modules,
    adapter_folder: tuple[Path, Path],
    tmp_path: Path,
    case: dict[str, Any],
) -> None:
    case = dict(case)
    shared = case.pop("shared", False)

    def run(name: str, stop: int | None = None, resume: bool = False) -> Any:
        models = (
            dict(zip(("reference", "aligned"), map(str, adapter_folder), strict=True))
            if shared
            else {"reference": copy.deepcopy(modules.reference), "aligned": modules.aligned}
        )
        trainer = make_trainer(
            make_rows(40),
            models=models,
            peft_config=lora(lora_dropout=0.1),
            callbacks=[_StopAfter(stop)] if stop else None,
            output_dir=str(tmp_path / name),
            **{
                "lam": RANGE,
                "max_steps": 6,
                "per_device_train_batch_size": 3,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2,
                "optim": "adamw_torch",
                "save_strategy": "steps",
                "save_steps": 2,
                "save_total_limit": None,
                **case,
            },
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    whole = run("whole")
    run("parts", stop=4)
    torch.manual_seed(99)  # what a new process would not know either
    resumed = run("parts", resume=True)

    expected = lora_state(whole.model, "default")
    for name, value in lora_state(resumed.model, "default").items():
        assert torch.equal(value, expected[name]), name
    for key in ("tokens_seen", "lambda", "divergence", "divergence_high", "grad_norm"):
        logs = [trainer.state.log_history[4:6] for trainer in (whole, resumed)]
        assert [log.get(key) for log in logs[0]] == [log.get(key) for log in logs[1]], key


@pytest.mark.parametrize("objective", ["token", "sequence", "sampled"])
def test_a_rollout_is_sampled_at_the_rows_lambda(
    dial_trainer: Callable[..., Any], modules: Modules, objective: str
) -> None:
    rows = make_rows(4)
    trainer = dial_trainer(
        rows,
        rollouts=1.0,
        rollout_objective=objective,
        max_length=40,
        per_device_train_batch_size=4,
    )
    asked: list[Tensor] = []
    forward = trainer.model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        asked.append(trainer.scale.lam.clone())
        return forward(*args, **kwargs)

    trainer.model.generate = generate
    lams = record(trainer)
    trainer.train()
    assert asked[0].tolist() == pytest.approx(list(lams.values()))
    low, high = RANGE.values()
    expected = [low + (high - low) * share for share in draw_shares(trainer.args.seed, 0, 4)]
    assert list(lams.values()) == pytest.approx(expected, rel=1e-6)
    assert trainer.state.log_history[0]["divergence"] > 0


def test_one_lora_learns_every_lambda(
    make_trainer: Callable[..., Any], adapter_folder: tuple[Path, Path]
) -> None:
    rows = make_rows(48)
    trainer = make_trainer(
        rows,
        models=dict(zip(("reference", "aligned"), map(str, adapter_folder), strict=True)),
        lam={"low": 0, "high": 2},
        eval_dataset=rows,
        max_steps=150,
        learning_rate=3e-3,
        optim="adamw_torch",
        peft_config=lora(r=16, lora_alpha=16),
        logging_steps=50,
    )
    names = [f"eval_divergence{part}" for part in ("", "_low", "_middle", "_high")]
    trainer.evaluate()
    before = trainer.state.log_history[-1]
    trainer.train()
    trainer.evaluate()
    after = trainer.state.log_history[-1]
    assert all(after[name] < before[name] for name in names)
    assert after["eval_divergence"] < 0.3 * before["eval_divergence"]


# What is refused.


def test_a_range_without_a_lora_is_refused(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"range \(-0.5:3\) trains one LoRA"):
        make_trainer(lam=RANGE)


def test_a_start_that_is_not_the_reference_is_refused(
    make_trainer: Callable[..., Any], modules: Modules, adapter_folder: tuple[Path, Path]
) -> None:
    models: dict[str, Any] = {
        "model": copy.deepcopy(modules.aligned),
        "reference": modules.reference,
        "aligned": modules.aligned,
    }
    with pytest.raises(ConfigError, match="one LoRA on the reference"):
        make_trainer(models=models, lam=RANGE, peft_config=lora())
    paths = {"model": "elsewhere", "reference": str(adapter_folder[0])}
    with pytest.raises(ConfigError, match="starts at the reference"):
        make_trainer(models=models | paths, lam=RANGE, peft_config=lora())


def test_a_lora_of_another_base_is_refused(
    make_trainer: Callable[..., Any], modules: Modules
) -> None:
    models = {
        "model": get_peft_model(copy.deepcopy(modules.aligned), lora()),
        "reference": modules.reference,
        "aligned": modules.aligned,
    }
    with pytest.raises(ConfigError, match="one LoRA on the reference"):
        make_trainer(models=models, lam=RANGE)


def test_a_lora_that_is_not_linear_in_its_strength_is_refused(
    make_trainer: Callable[..., Any],
) -> None:
    with pytest.raises(UnsupportedModelError, match="use_dora"):
        make_trainer(lam=RANGE, peft_config=lora(use_dora=True))


def test_settings_take_every_form_of_a_range_and_refuse_rounds(
    settings: Callable[..., TrRaConfig],
) -> None:
    assert settings(lam="-0.5:3").lam == RANGE
    assert settings(lam='{"low": -0.5, "high": 3}').lam == RANGE
    with pytest.raises(ConfigError, match="rounds with a range of λ"):
        settings(lam=RANGE, rounds=2)
    with pytest.raises(LambdaError, match="larger high"):
        settings(lam={"low": 2, "high": 2})


# A whole run.


class _Leave(TrainerCallback):
    """Ends a run at a step as Ctrl-C does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)


def test_a_run_that_was_stopped_ends_as_the_same_dial(tmp_path: Path, tiny_pair: Any) -> None:
    def asked(text: str) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": text}]}

    rows = [
        asked(f"{n}+{n}=") | {"completion": [{"role": "assistant", "content": f"again {2 * n}"}]}
        for n in range(8)
    ]
    questions = [asked("1+1=") | {"answer": "2"}]
    for name, given in (("traces", rows), ("questions", questions)):
        text = "".join(json.dumps(row) + "\n" for row in given)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    tree: dict[str, Any] = {
        "reference": str(tiny_pair.reference),
        "aligned": str(tiny_pair.aligned),
        "data": str(tmp_path / "traces.jsonl"),
        "output": str(tmp_path / "whole"),
        "lambda": {"low": 0, "high": 4},
        "gate": 0.1,
        "lora": {"r": 4},
        "system": "Be brief.",
        "watch": {
            "prompts": str(tmp_path / "questions.jsonl"),
            "every_steps": 2,
            "max_new_tokens": 4,
        },
        "training": {
            "max_steps": 4,
            "save_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_length": 64,
        },
    }
    whole = realign(tree)
    assert whole.to_json()["lambda_range"] == (0.0, 4.0)
    assert whole.to_json()["effective_lambda"] is None
    measured = [(row["step"], row["lambda"]) for row in whole.curve]
    assert measured == [(0, 0.0), *((step, lam) for step in (2, 4) for lam in (1.0, 2.0, 4.0))]

    parts = tree | {"output": str(tmp_path / "parts")}
    with pytest.raises(Stopped):
        realign(parts, callbacks=[_Leave()])
    again = realign(parts)
    assert again.curve == whole.curve
    for name in ("adapter_model.safetensors", "lora_dial.json", "adapter_config.json"):
        assert (again.output / name).read_bytes() == (whole.output / name).read_bytes(), name

    settings = json.loads((whole.output / "lora_dial.json").read_text())
    assert settings["base"] == tree["reference"]
    assert settings["rendering"]["system"] == "Be brief."
    dial = load_dial(tree["reference"], whole.output)
    plain = PeftModel.from_pretrained(load_model(tree["reference"]), whole.output).eval()
    ids = torch.arange(10, 30)[None]
    expected = plain(input_ids=ids).logits
    torch.testing.assert_close(dial(ids, lam=1.0).logits, expected)
    assert (dial(ids, lam=4.0).logits - expected).abs().max() > 1e-4
    assert "## The curve over λ" in (whole.output / "README.md").read_text(encoding="utf-8")
