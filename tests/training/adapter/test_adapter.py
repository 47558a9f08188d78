import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from flexalign.errors import ConfigError, DataError, LambdaError
from flexalign.fusion import fuse
from flexalign.inra import InRaModel
from flexalign.training import Adaptation, AdaptRecipe, BakeRecipe, adapt
from flexalign.training.adapter import AdapterSFTTrainer, adapter_off, as_student

Model = Callable[..., Any]


class Watch(TrainerCallback):  # type: ignore[misc]
    """Keeps what a trainer logs, its optimizer, and its model."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.optimizer: Any = None
        self.trained: list[str] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_step_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.optimizer = optimizer
        self.trained = [n for n, p in kwargs["model"].named_parameters() if p.grad is not None]


def settings_of(method: str, tiny_pair: Any) -> dict[str, Any]:
    trra = {"aligned": str(tiny_pair.aligned), "lam": 1.5}
    return {"method": method, **(trra if method == "trra" else {})}


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_but_the_adapter_changes(
    family: str, checkpointing: bool, tiny_model: Model, traces: Dataset, train: Any
) -> None:
    base = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    logits = base(torch.arange(1, 9)[None]).logits
    outcome = train(base, traces, training={"activation_checkpointing": checkpointing})
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(base(torch.arange(1, 9)[None]).logits, logits)
    assert flags.keys() == dict(base.named_parameters()).keys()
    model = InRaModel.from_pretrained(base, outcome.output)
    ids = torch.arange(1, 9)[None]
    assert not torch.allclose(model(ids, lam=1.0).logits, logits, atol=1e-3)
    assert model.inra_config.default_lambda == 0.0
    assert model.inra_config.thinking_tags == ("<think>", "</think>")


@pytest.mark.parametrize("method", ["sft", "dpo", "trra"])
def test_optimizer_and_gradients_are_the_adapters_alone(
    method: str,
    tiny_model: Model,
    tiny_pair: Any,
    traces: Dataset,
    preferences: Dataset,
    train: Any,
) -> None:
    base = tiny_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    watch = Watch()
    data = preferences if method == "dpo" else traces
    train(base, data, callbacks=[watch], **settings_of(method, tiny_pair))
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    layer = sum(parameter.numel() for parameter in base.model.layers[0].parameters())
    groups = watch.optimizer.param_groups
    assert sum(part.numel() for group in groups for part in group["params"]) == layer
    moments = [state["exp_avg"].numel() for state in watch.optimizer.state.values()]
    assert sum(moments) == layer


def test_checkpointing_changes_no_result(tiny_model: Model, traces: Dataset, train: Any) -> None:
    folders = [
        train(tiny_model(), traces, name=str(on), training={"activation_checkpointing": on}).output
        for on in (False, True)
    ]
    plain, checkpointed = (InRaModel.from_pretrained(tiny_model(), f) for f in folders)
    for one, other in zip(
        plain.adapter.parameters(), checkpointed.adapter.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_first_sft_loss_is_the_bases_own(
    tiny_model: Model, tiny_tokenizer: Any, traces: Dataset, train: Any
) -> None:
    """A fresh adapter is the identity: mean negative log-likelihood of the answers, in float64."""
    base, watch = tiny_model(), Watch()
    train(
        base,
        traces,
        callbacks=[watch],
        strip_thinking=True,
        training={"per_device_train_batch_size": 8, "max_steps": 1},
    )
    nats, tokens = 0.0, 0
    twin = tiny_model().double()
    for n in range(8):
        prompt = tiny_tokenizer(f"{n}+{n}=")["input_ids"]
        whole = tiny_tokenizer(f"{n}+{n}={2 * n} {n * n}<|im_end|>")["input_ids"]
        ids = torch.tensor([whole])
        with torch.no_grad():
            log_probs = twin(ids).logits[0, :-1].log_softmax(-1)
        picked = log_probs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        nats, tokens = nats - float(picked.sum()), tokens + len(picked)
    assert watch.losses[0] == pytest.approx(nats / tokens, abs=2e-4)


def test_the_trra_loss_is_a_float64_twins(
    tiny_model: Model, tiny_pair: Any, tiny_tokenizer: Any, traces: Dataset, train: Any
) -> None:
    from transformers import AutoModelForCausalLM

    watch = Watch()
    one_batch = {"per_device_train_batch_size": 8, "max_steps": 2, "warmup_steps": 0}
    outcome = train(
        str(tiny_pair.reference),
        traces,
        callbacks=[watch],
        method="trra",
        aligned=str(tiny_pair.aligned),
        lam=1.5,
        training=one_batch | {"save_steps": 1},
    )
    for step in (0, 1):
        base, aligned = (AutoModelForCausalLM.from_pretrained(p).double() for p in tiny_pair)
        model = InRaModel.create(base)
        if step:
            model = InRaModel.from_pretrained(base, outcome.output / "checkpoint-1")
            model.adapter.double()
        nats, tokens = 0.0, 0
        for row in traces:
            prompt = tiny_tokenizer(row["prompt"])["input_ids"]
            ids = torch.tensor(
                [tiny_tokenizer(row["prompt"] + row["completion"] + "<|im_end|>")["input_ids"]]
            )
            with torch.no_grad():
                student = model(ids, lam=1.0).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                both = [part(ids).logits[0, len(prompt) - 1 : -1] for part in (base, aligned)]
                teacher = fuse(*both, 1.5).log_softmax(-1)
                nats += float((student.exp() * (student - teacher)).sum())
            tokens += len(student)
        assert watch.losses[step] == pytest.approx(nats / tokens, rel=1e-3, abs=1e-5)


def test_dpo_starts_at_log_2_and_follows_two_separate_models(
    tiny_model: Model,
    tiny_tokenizer: Any,
    preferences: Dataset,
    train: Any,
    training: dict[str, Any],
    tmp_path: Any,
) -> None:
    """The same training with a reference of its own: TRL's trainer, a second model in memory."""
    watch = Watch()
    options = {"max_steps": 3, "warmup_steps": 0, "learning_rate": 5e-3}
    outcome = train(tiny_model(), preferences, callbacks=[watch], method="dpo", training=options)
    assert watch.losses[0] == pytest.approx(math.log(2), abs=1e-5)

    inra, naive = InRaModel.create(tiny_model()), Watch()
    schedule = {"lr_scheduler_type": "cosine", "save_strategy": "no", "report_to": "none"}
    arguments = DPOConfig(
        output_dir=str(tmp_path / "naive"),
        bf16=False,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        **training | options | schedule,
    )
    with as_student(inra) as student:
        trainer = DPOTrainer(
            model=student,
            ref_model=tiny_model(),
            args=arguments,
            train_dataset=preferences,
            processing_class=tiny_tokenizer,
            callbacks=[naive],
        )
        trainer.train()
    assert watch.losses == pytest.approx(naive.losses, abs=1e-5)
    assert watch.losses[-1] != pytest.approx(math.log(2), abs=1e-3)
    trained = InRaModel.from_pretrained(tiny_model(), outcome.output)
    for one, other in zip(trained.adapter.parameters(), inra.adapter.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["dpo", "trra"])
def test_the_base_is_in_memory_once(
    method: str,
    tiny_model: Model,
    tiny_pair: Any,
    tiny_tokenizer: Any,
    traces: Dataset,
    preferences: Dataset,
    training: dict[str, Any],
    tmp_path: Any,
) -> None:
    settings = settings_of(method, tiny_pair)
    settings = {("lambda" if key == "lam" else key): value for key, value in settings.items()}
    recipe = AdaptRecipe.parse(
        {"base": "b", "data": "d", "output": str(tmp_path / "out"), "training": training} | settings
    )
    data = preferences if method == "dpo" else traces
    run = Adaptation(recipe, data, tiny_tokenizer, models=[], command="")
    run.base = base = tiny_model()
    storages = {parameter.data_ptr() for parameter in base.parameters()}
    size = sum(parameter.numel() for parameter in base.parameters())
    layer = sum(parameter.numel() for parameter in base.model.layers[0].parameters())
    with run._trainer([], run.rounds[0]) as trainer:
        held = [trainer.model, *([trainer.objective.aligned.model] if method == "trra" else [])]
        if method == "dpo":
            assert trainer.ref_model is None
        else:
            assert trainer.objective.reference.model is trainer.model
        ours = {p.data_ptr(): p.numel() for p in trainer.model.parameters()}
        assert storages <= ours.keys()
        assert sum(ours.values()) == size + layer
        assert len(held) == (2 if method == "trra" else 1)


def test_the_adapter_is_passed_by_where_it_is_off(tiny_model: Model) -> None:
    ids = torch.arange(1, 9)[None]
    plain = tiny_model()(ids).logits
    model = InRaModel.create(tiny_model())
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.add_(0.05)
    expected = model(ids, lam=1.0).logits
    with as_student(model) as student:
        assert torch.equal(student(ids).logits, expected)
        with adapter_off(model.adapter_hook):
            assert torch.equal(student(ids).logits, plain)
    assert torch.equal(model.base(ids).logits, plain)


def test_strip_thinking_leaves_the_answer(tiny_model: Model, traces: Dataset, train: Any) -> None:
    answers = traces.map(lambda row: {"completion": row["completion"].split("</think>")[1].strip()})
    one = train(tiny_model(), traces, name="one", strip_thinking=True).output
    other = train(tiny_model(), answers, name="other").output
    weights = [(folder / "inra_adapter.safetensors").read_bytes() for folder in (one, other)]
    assert weights[0] == weights[1]
    with pytest.raises(DataError, match="</think>"):
        train(tiny_model(), answers, name="third", strip_thinking=True)


def test_a_resumed_run_is_bit_equal(tiny_model: Model, traces: Dataset, train: Any) -> None:
    class Halt(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    training = {"max_steps": 4, "save_steps": 1}
    whole = train(tiny_model(), traces, name="whole", training=training)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), traces, name="halves", training=training, callbacks=[Halt()])
    halves = train(tiny_model(), traces, name="halves", training=training)
    assert halves.steps == whole.steps == 4
    weights = [(run.output / "inra_adapter.safetensors").read_bytes() for run in (whole, halves)]
    assert weights[0] == weights[1]


def test_an_adapter_goes_on_from_where_it_was(
    tiny_model: Model, tiny_pair: Any, traces: Dataset, train: Any
) -> None:
    reference = str(tiny_pair.reference)
    first = train(reference, traces, name="first")
    idle = train(
        reference, traces, name="idle", adapter=str(first.output), training={"learning_rate": 0.0}
    )
    weights = [(run.output / "inra_adapter.safetensors").read_bytes() for run in (first, idle)]
    assert weights[0] == weights[1]


def test_a_finished_run_is_not_run_again_and_another_is_refused(
    tiny_model: Model, traces: Dataset, train: Any
) -> None:
    outcome = train(tiny_model(), traces)
    manifest = json.loads((outcome.output / "manifest.json").read_text())
    assert train(tiny_model(), traces) == outcome
    assert json.loads((outcome.output / "manifest.json").read_text()) == manifest
    with pytest.raises(ConfigError, match="another run"):
        train(tiny_model(), traces, training={"learning_rate": 5e-4})
    card = (outcome.output / "README.md").read_text()
    assert "supervised fine-tuning" in card
    assert "InRaModel.from_pretrained" in card


def test_a_base_in_half_precision_is_trained_in_float32(
    tiny_model: Model, traces: Dataset, train: Any
) -> None:
    base = tiny_model().bfloat16()
    outcome = train(base, traces, training={"bf16": True, "use_cpu": True})
    model = InRaModel.from_pretrained(base, outcome.output)
    assert {parameter.dtype for parameter in model.adapter.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_layers": 0}, "adapter_layers must be at least 1, got 0"),
        ({"adapter": "a", "adapter_layers": 2}, "adapter_layers is for a new adapter"),
        (
            {"training": {"activation_checkpointing_kwargs": {"use_reentrant": True}}},
            "reentrant checkpointing passes no gradient through frozen layers",
        ),
        ({"training": {"lr_scheduler_type": "cosin"}}, "^training: .*cosin"),
        (
            {"method": "dpo", "training": {"precompute_ref_log_probs": False}},
            "precompute_ref_log_probs: false would load a second base",
        ),
        ({"method": "trra", "lambda": 1.0}, "needs `aligned` and `lambda`"),
    ],
)
def test_mistakes_in_a_recipe_are_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        AdaptRecipe.parse({"base": "b", "data": "d", "output": "o"} | changes)
    assert "\n" not in str(caught.value)


def test_epochs_alone_decide_the_steps() -> None:
    recipe = {"base": "b", "data": "d", "output": "o"}
    arguments = AdaptRecipe.parse(recipe | {"training": {"num_train_epochs": 2}})
    assert arguments.training_arguments().max_steps == -1


@pytest.mark.parametrize("held_out", [0, 1, -0.5, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(held_out: float) -> None:
    recipe = {"base": "b", "adapter": "a", "data": "d", "output": "o", "lambda": 0.5}
    with pytest.raises(ConfigError, match="held_out must lie between 0 and 1"):
        BakeRecipe.parse(recipe | {"held_out": held_out})


@pytest.mark.parametrize("lam", [float("nan"), float("inf")])
def test_a_lambda_to_bake_is_a_finite_number(lam: float) -> None:
    recipe = {"base": "b", "adapter": "a", "data": "d", "output": "o", "lambda": lam}
    with pytest.raises(LambdaError, match="lambda must be a finite number"):
        BakeRecipe.parse(recipe)


def test_a_loaded_base_needs_its_tokenizer(
    tiny_model: Model, traces: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="give its tokenizer too"):
        adapt(tiny_model(), traces, tmp_path / "out")


def test_a_bases_own_forward_comes_back(tiny_model: Model) -> None:
    model = InRaModel.create(tiny_model())
    own = functools.partial(type(model.base).forward, model.base)
    model.base.forward = own
    with as_student(model) as student:
        student.forward = None
    assert model.base.forward is own


def test_the_best_adapter_is_loaded_in_the_end(
    tiny_model: Model, traces: Dataset, tmp_path: Path
) -> None:
    model = InRaModel.create(tiny_model())
    folder = tmp_path / "best"
    model.save_pretrained(folder)
    best = {name: tensor.clone() for name, tensor in model.adapter.state_dict().items()}
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.add_(1.0)
    trainer = SimpleNamespace(inra=model, state=SimpleNamespace(best_model_checkpoint=str(folder)))
    AdapterSFTTrainer._load_best_model(trainer)
    for name, tensor in model.adapter.state_dict().items():
        assert torch.equal(tensor, best[name]), name
