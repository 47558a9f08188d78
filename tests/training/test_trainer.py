import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from families import family_model
from flexalign.errors import ConfigError, UnsupportedModelError
from flexalign.losses import teacher
from flexalign.training import TrRaTrainer
from twin import divergence64, fuse64

from .conftest import BOTH_MODELS, BUFFERS, FUSED, Modules, lora, make_rows

VOCAB = 320


def dense_loss(
    student: nn.Module,
    reference: nn.Module,
    aligned: nn.Module,
    rows: Dataset,
    lam: float,
    divergence: str = "reverse",
    beta: float = 0.5,
) -> Tensor:
    """Equation 6 row by row in float64, over the response tokens of all rows."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor(row["input_ids"])[None]
        mask = torch.tensor(row["labels"])[1:] != -100
        with torch.no_grad():
            r, a = (m(input_ids=ids).logits[0, :-1, :VOCAB] for m in (reference, aligned))
        s = student(input_ids=ids).logits[0, :-1, :VOCAB]
        losses = divergence64(s, fuse64(r, a, lam), divergence, beta)
        total, count = total + losses[mask].sum(), count + int(mask.sum())
    return total / count


def twin_gradients(
    modules: Modules, rows: Dataset, lam: float, **options: Any
) -> dict[str, Tensor]:
    """The gradients of the dense loss for a student at the reference."""
    student = copy.deepcopy(modules.reference).double().eval().requires_grad_(True)
    reference, aligned = (copy.deepcopy(model).double() for model in modules)
    dense_loss(student, reference, aligned, rows, lam, **options).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def step(trainer: Any) -> dict[str, Tensor]:
    """Train one step of plain SGD at rate 1 and return the gradients that it took."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return {name: before[name] - p.detach() for name, p in trainer.model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(
            found[name].double(), gradient, rtol=0, atol=float(2e-5 * scale + 2e-7), msg=name
        )


@pytest.mark.parametrize("batch", [(8, 1), (1, 8), (2, 4)])
def test_one_denominator_however_a_step_is_cut(
    make_trainer: Callable[..., Any], modules: Modules, batch: tuple[int, int]
) -> None:
    size, accumulation = batch
    rows = make_rows(8)
    expected = twin_gradients(modules, rows, 2.0)
    trainer = make_trainer(
        rows, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
    )
    assert_same(step(trainer), expected)
    teachers = [copy.deepcopy(model).double() for model in modules]
    loss = dense_loss(teachers[0], *teachers, rows, 2.0)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert logged["divergence"] == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "forward"},
        {"divergence": "jsd", "beta": 0.3},
        {"activation_checkpointing": True},
        {"packing": True, "max_length": 64, "per_device_train_batch_size": 4},
        {"chunk_size": 3},
        {"lam": {"kind": "linear", "start": 0.5, "end": 2, "steps": 10}},
        {"dataloader_num_workers": 0, "train_sampling_strategy": "group_by_length"},
    ],
    ids=str,
)
def test_the_gradient_is_the_twins_in_every_setting(
    make_trainer: Callable[..., Any], modules: Modules, options: dict[str, Any]
) -> None:
    rows = make_rows(8)
    lam = 0.5 if "lam" in options else 2.0
    twin = {name: options[name] for name in ("divergence", "beta") if name in options}
    trainer = make_trainer(rows, **options)
    assert_same(step(trainer), twin_gradients(modules, rows, lam, **twin))
    assert trainer.state.log_history[0]["lambda"] == lam


def test_widths_and_padded_vocabularies_may_differ(
    make_trainer: Callable[..., Any], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    reference = tiny_model(vocab_size=352, tie_word_embeddings=False)
    aligned = tiny_model(vocab_size=384, hidden_size=32, seed=5)
    rows = make_rows(8)
    modules = Modules(reference, aligned)
    models = {"model": copy.deepcopy(reference), "reference": reference, "aligned": aligned}
    found = step(make_trainer(rows, models=models))
    assert_same(found, twin_gradients(modules, rows, 2.0))
    assert not found["lm_head.weight"][VOCAB:].any()


def test_a_response_without_tokens_costs_nothing_and_breaks_nothing(
    make_trainer: Callable[..., Any], modules: Modules
) -> None:
    rows = make_rows(4)
    empty = {"input_ids": [11, 12, 13], "labels": [-100, -100, -100]}
    mixed = Dataset.from_list([*rows, empty, empty, empty, empty])
    trainer = make_trainer(
        mixed,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    assert_same(step(trainer), twin_gradients(modules, rows, 2.0))


def test_the_teachers_stay_as_they_were(make_trainer: Callable[..., Any], modules: Modules) -> None:
    before = [copy.deepcopy(model.state_dict()) for model in modules]
    trainer = make_trainer(max_steps=3)
    trainer.train()
    for model, old in zip(modules, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_dropout_is_the_students_alone(make_trainer: Callable[..., Any], modules: Modules) -> None:
    """With the student's weights frozen at λ=0, all of the loss is the student's dropout."""
    noisy = copy.deepcopy(modules.reference)
    for layer in noisy.model.layers:
        layer.self_attn.attention_dropout = 0.3
    models = {"model": noisy, "reference": copy.deepcopy(noisy), "aligned": modules.aligned}
    trainer = make_trainer(models=models, lam=0.0, learning_rate=0.0, eval_dataset=make_rows(8))
    trainer.train()
    assert trainer.state.log_history[0]["divergence"] > 1e-3
    assert trainer.evaluate()["eval_divergence"] == pytest.approx(0, abs=1e-6)


def test_it_learns_what_the_teachers_say(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(
        lam=1.0, max_steps=60, learning_rate=3e-3, optim="adamw_torch", max_grad_norm=1.0
    )
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert last["divergence"] < 0.05 * first["divergence"]
    assert last["kl_aligned"] == pytest.approx(last["divergence"], rel=1e-3)
    assert first["kl_reference"] == pytest.approx(0, abs=1e-6)
    assert last["kl_reference"] > last["kl_aligned"]


def test_the_log_counts_tokens_and_follows_the_schedule(make_trainer: Callable[..., Any]) -> None:
    rows = make_rows(8)
    trainer = make_trainer(
        rows,
        per_device_train_batch_size=4,
        max_steps=4,
        lam={"kind": "linear", "start": 0, "end": 2, "steps": 4},
    )
    trainer.train()
    logs = trainer.state.log_history[:4]
    assert [log["lambda"] for log in logs] == [0.0, 0.5, 1.0, 1.5]
    tokens = sum(len(ids) for ids in rows["input_ids"])
    assert [log["tokens_seen"] for log in logs][1::2] == [tokens, 2 * tokens]
    assert "learning_rate" in logs[0]


@pytest.mark.parametrize("packing", [False, True])
def test_an_evaluation_weighs_every_token_alike(
    make_trainer: Callable[..., Any], modules: Modules, packing: bool
) -> None:
    rows = make_rows(8)
    trainer = make_trainer(eval_dataset=rows, per_device_eval_batch_size=3, packing=packing)
    teachers = [copy.deepcopy(model).double() for model in modules]
    expected = dense_loss(teachers[0], *teachers, rows, 2.0)
    assert trainer.evaluate()["eval_divergence"] == pytest.approx(float(expected), rel=1e-4)


BEST = {
    "max_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


@pytest.mark.parametrize("metric", ["eval_mean_token_accuracy", "entropy", "eval_dvergence"])
def test_a_metric_that_no_evaluation_measures_is_refused_at_once(
    make_trainer: Callable[..., Any], metric: str
) -> None:
    with pytest.raises(ConfigError, match=f"metric_for_best_model='{metric}' is not measured"):
        make_trainer(eval_dataset=make_rows(8), metric_for_best_model=metric, **BEST)


@pytest.mark.parametrize("metric", ["divergence", "eval_kl_aligned", "loss"])
def test_the_best_model_is_found_by_what_is_measured(
    make_trainer: Callable[..., Any], metric: str
) -> None:
    trainer = make_trainer(
        eval_dataset=make_rows(8), metric_for_best_model=metric, greater_is_better=False, **BEST
    )
    trainer.train()
    name = f"eval_{metric.removeprefix('eval_')}"
    measured = [log[name] for log in trainer.state.log_history if name in log]
    assert trainer.state.best_metric == min(measured[:2])


def test_each_of_several_evaluations_has_its_own_divergence(
    make_trainer: Callable[..., Any],
) -> None:
    rows = {"near": make_rows(8), "far": make_rows(6, seed=9)}
    found = make_trainer(
        eval_dataset=rows, metric_for_best_model="eval_far_divergence", **BEST
    ).evaluate()
    for name, one in rows.items():
        alone = make_trainer(eval_dataset=one).evaluate()
        assert found[f"eval_{name}_divergence"] == pytest.approx(alone["eval_divergence"])
    with pytest.raises(ConfigError, match="did you mean 'eval_far_divergence'"):
        make_trainer(eval_dataset=rows, metric_for_best_model="eval_for_divergence", **BEST)


def test_text_rows_go_through_trls_templates_and_masks(
    make_trainer: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    asked = [{"role": "user", "content": "what is one plus two"}]
    answered = [{"role": "assistant", "content": "the answer is three"}]
    trainer = make_trainer(Dataset.from_list([{"prompt": asked, "completion": answered}] * 8))
    labels = trainer.train_dataset[0]["labels"]
    kept = tiny_tokenizer.decode([token for token in labels if token != -100])
    assert kept == "the answer is three<|im_end|>"
    trainer.train()
    assert trainer.state.log_history[0]["divergence"] > 0


def test_half_precision_trains_on_a_processor(make_trainer: Callable[..., Any]) -> None:
    exact = make_trainer()
    exact.train()
    half = make_trainer(bf16=True)
    half.train()
    expected, found = (t.state.log_history[0]["divergence"] for t in (exact, half))
    assert found == pytest.approx(expected, rel=0.05)
    assert found != expected
    assert next(half.model.parameters()).dtype == torch.float32


def test_a_copy_of_the_trained_model_is_a_model_of_its_own(
    make_trainer: Callable[..., Any],
) -> None:
    trainer = make_trainer()
    trainer.train()
    ids = torch.arange(10, 20)[None]
    duplicate = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    assert duplicate(input_ids=ids).logits.abs().max() > 0


def test_packing_is_refused_where_documents_leak(
    make_trainer: Callable[..., Any], modules: Modules
) -> None:
    leaky = family_model("falcon", vocab_size=VOCAB)
    models = {"model": modules.reference, "aligned": leaky}
    with pytest.raises(UnsupportedModelError, match=r"aligned model \(family falcon\)"):
        make_trainer(models=models, packing=True)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("reference",), "needs a reference and an aligned"),
        (("aligned",), "needs a reference and an aligned"),
    ],
)
def test_missing_models_are_named(
    make_trainer: Callable[..., Any], modules: Modules, names: tuple[str, ...], reason: str
) -> None:
    models = {name: getattr(modules, name) for name in names}
    with pytest.raises(ConfigError, match=reason):
        make_trainer(models=models)


def test_two_peft_settings_contradict_each_other(
    make_trainer: Callable[..., Any], modules: Modules
) -> None:
    models = {"model": get_peft_model(modules.reference, lora()), "aligned": modules.aligned}
    with pytest.raises(ConfigError, match="leave out peft_config"):
        make_trainer(models=models, peft_config=lora())


def test_a_student_without_a_trainable_weight_is_refused(
    make_trainer: Callable[..., Any], modules: Modules
) -> None:
    frozen = copy.deepcopy(modules.reference).requires_grad_(False)
    with pytest.raises(ConfigError, match="requires_grad_"):
        make_trainer(models={"model": frozen, **modules._asdict()})


def test_all_three_models_attend_as_told(make_trainer: Callable[..., Any]) -> None:
    rows = make_rows(4)
    losses = {}
    for attention in ("sdpa", "eager"):
        trainer = make_trainer(rows, model_init_kwargs={"attn_implementation": attention})
        models = (trainer.model, trainer.objective.reference.model, trainer.objective.aligned.model)
        assert {model.config._attn_implementation for model in models} == {attention}
        trainer.train()
        losses[attention] = trainer.state.log_history[0]["divergence"]
    assert losses["eager"] == pytest.approx(losses["sdpa"], rel=1e-4)


def test_attention_that_is_not_to_be_had_is_refused_by_model(
    make_trainer: Callable[..., Any],
) -> None:
    with pytest.raises(ConfigError, match="attn_implementation='flash_attention_2' for the "):
        make_trainer(model_init_kwargs={"attn_implementation": "flash_attention_2"})


@pytest.mark.parametrize(
    "name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"]
)
def test_what_wants_logits_is_refused(
    settings: Callable[..., Any], modules: Modules, name: str
) -> None:
    with pytest.raises(ConfigError, match=f"{name}: the loss builds no logits"):
        TrRaTrainer(
            *modules, args=settings(), train_dataset=make_rows(2), **{name: lambda *_: None}
        )


def test_outputs_are_not_to_be_had(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(make_rows(2))
    inputs = trainer.data_collator(list(make_rows(2)))
    with pytest.raises(ConfigError, match="prediction_loss_only=True"):
        trainer.compute_loss(trainer.model, inputs, return_outputs=True)


def test_a_forward_of_the_students_own_is_kept(
    make_trainer: Callable[..., Any], modules: Modules
) -> None:
    student = copy.deepcopy(modules.reference)
    calls: list[int] = []
    plain = type(student).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(student, *args, **kwargs)

    student.forward = forward
    make_trainer(models={"model": student, **modules._asdict()})
    assert student.forward is forward
    calls.clear()
    student(torch.arange(9)[None])
    assert calls == [1]


@pytest.mark.parametrize("name", ["cp_enabled", "sp_enabled"])
def test_a_split_sequence_is_refused(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trainer = make_trainer(make_rows(2))
    split = SimpleNamespace(**{"cp_enabled": False, "sp_enabled": False, name: True})
    monkeypatch.setattr(trainer.accelerator.state, "parallelism_config", split, raising=False)
    with pytest.raises(ConfigError, match=r"split a sequence over devices.*use data parallelism"):
        trainer._refuse_sequence_parallelism()


def test_a_step_that_is_not_logged_makes_no_logits_of_either_teacher(
    make_trainer: Callable[..., Any], watched: list[list[int]]
) -> None:
    trainer = make_trainer(
        max_steps=8,
        logging_steps=3,
        logging_first_step=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    logged = [BUFFERS, BOTH_MODELS, FUSED]
    a_step = [logged if step in (1, 3, 6, 8) else [BUFFERS] for step in range(1, 9)]
    assert watched == [batch for batch in a_step for _ in range(2)]
    assert [entry["step"] for entry in trainer.state.log_history] == [1, 3, 6, 8]
    assert all({"kl_reference", "kl_aligned"} <= set(line) for line in trainer.state.log_history)


def test_two_teachers_with_equal_heads_need_one_product(
    make_trainer: Callable[..., Any], modules: Modules, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = modules.reference.get_output_embeddings().weight
    modules.aligned.get_output_embeddings().weight.data.copy_(weight)
    rows, products, after = make_rows(8), [], []

    def project(hidden: Tensor, weight: Tensor, out: Tensor, **options: Any) -> None:
        products.append(len(weight))
        teacher_project(hidden, weight, out, **options)

    teacher_project = teacher.project
    monkeypatch.setattr(teacher, "project", project)

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            after.append(
                {name: p.detach().clone() for name, p in given["model"].named_parameters()}
            )

    # The first step is not logged, so it needs the fused logits alone: the student's product and one.
    trainer = make_trainer(rows, max_steps=2, logging_steps=2, callbacks=[Watch()])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert products == [VOCAB] * (2 + 3)
    found = {name: before[name] - value for name, value in after[0].items()}
    assert_same(found, twin_gradients(modules, rows, 2.0))


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({"logging_strategy": "no"}, [False, False, True]),
        ({"logging_strategy": "epoch"}, [True, True, True]),
        ({"logging_steps": 0.5}, [False, True, True]),
        ({"logging_steps": 2, "lam": 0.0}, [False, True, True]),
    ],
    ids=str,
)
def test_the_steps_that_are_measured_follow_the_settings_of_the_log(
    make_trainer: Callable[..., Any], options: dict[str, Any], measured: list[bool]
) -> None:
    trainer = make_trainer(**{"max_steps": 3, "learning_rate": 1e-3, **options})
    asked = []
    original = trainer.objective.__call__

    class Watched:
        def __call__(self, *args: Any) -> Any:
            loss, metrics = original(*args)
            asked.append(metrics is not None)
            return loss, metrics

    trainer.objective = Watched()
    trainer.train()
    assert asked == measured
    lines = [entry for entry in trainer.state.log_history if "divergence" in entry]
    assert lines[-1]["step"] == 3
    assert all(entry["kl_aligned"] > 0 for entry in lines)


def test_a_line_has_the_mean_divergence_of_its_steps_and_the_distances_of_the_last(
    make_trainer: Callable[..., Any], modules: Modules
) -> None:
    settings = {"max_steps": 4, "learning_rate": 0.3, "per_device_train_batch_size": 4}
    rows = make_rows(16)
    fine = make_trainer(rows, models=copied(modules), **settings)
    fine.train()
    coarse = make_trainer(rows, models=copied(modules), logging_steps=2, **settings)
    coarse.train()

    each, line = fine.state.log_history[:4], coarse.state.log_history[1]
    for name in ("kl_reference", "kl_aligned"):
        assert line[name] == pytest.approx(each[3][name], rel=1e-3)
        assert line[name] != pytest.approx(each[2][name], rel=5e-3)
    divergences = [entry["divergence"] for entry in each[2:]]
    assert min(divergences) < line["divergence"] < max(divergences)
    assert line["tokens_seen"] == each[3]["tokens_seen"]


def copied(modules: Modules) -> dict[str, Any]:
    student, *teachers = (copy.deepcopy(m) for m in (modules.reference, *modules))
    return {"model": student, "reference": teachers[0], "aligned": teachers[1]}


@pytest.mark.parametrize(("lam", "side"), [(0.0, "aligned"), (1.0, "reference")])
def test_a_teacher_that_lambda_leaves_out_runs_at_logged_steps_only(
    make_trainer: Callable[..., Any], modules: Modules, lam: float, side: str
) -> None:
    rows = make_rows(8)
    trainer = make_trainer(rows, lam=lam, max_steps=2, logging_steps=2)
    expected = twin_gradients(modules, rows, lam)
    passes: list[int] = []
    getattr(trainer.objective, side).model.register_forward_pre_hook(
        lambda *_: passes.append(trainer.state.global_step)
    )
    found: list[dict[str, Tensor]] = []

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            found.append({name: p.grad.clone() for name, p in kwargs["model"].named_parameters()})

    trainer.add_callback(Gradients())
    trainer.train()
    assert passes == [1]
    assert_same(found[0], expected)


def test_the_model_carries_the_tags_of_trl_and_of_the_method(
    make_trainer: Callable[..., Any],
) -> None:
    trainer = make_trainer(make_rows(2))
    assert trainer.model.model_tags == ["trl", "flexalign", "trra"]
    trainer.create_model_card()
    data = ModelCard.load(f"{trainer.args.output_dir}/README.md").data
    assert {"trl", "flexalign", "trra"} <= set(data.tags)
