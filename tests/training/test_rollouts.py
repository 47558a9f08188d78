"""Batches that the student samples: what is drawn, what is counted, and what it aims at."""

import copy
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from flexalign.errors import ConfigError, DataError
from flexalign.fusion import concatenate_hidden
from flexalign.heads import Head, last_hidden
from flexalign.losses import fused_divergence
from flexalign.training import TrRaConfig
from flexalign.training.rollouts import sample_responses

from .conftest import Modules, lora, make_rows
from .test_resume import RUN, _StopAfter, student
from .test_trainer import assert_same, dense_loss, step

ON_POLICY = {"rollouts": 1.0, "rollout_max_new_tokens": 6, "max_length": 64}


def as_batch(rows: list[tuple[list[int], list[int]]], pad: int = 0) -> dict[str, torch.Tensor]:
    """Rows of (tokens, labels), padded on the right."""
    longest = max(len(ids) for ids, _ in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([padded(ids, pad) for ids, _ in rows]),
        "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in rows]),
        "labels": torch.tensor([padded(labels, -100) for _, labels in rows]),
    }


def keep_batches(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """Let a trainer note the batches that reach its loss."""
    seen: list[dict[str, torch.Tensor]] = []
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(dict(inputs))
        return inner(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    return seen


def test_a_sample_takes_the_last_responses_place(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any
) -> None:
    model = tiny_model()
    turns = ([11, 12, 13, 14, 15, 16, 17], [-100, 12, 13, -100, -100, 16, 17])
    short, cut = ([21, 22, 23], [-100, 22, 23]), ([31, 32, 33, 34], [-100] * 4)
    sampled = sample_responses(
        model, tiny_tokenizer, as_batch([turns, short, cut]), max_length=9, max_new_tokens=6
    )
    ids, labels = sampled["input_ids"].tolist(), sampled["labels"].tolist()
    lengths = sampled["attention_mask"].sum(1).tolist()
    for row, prompt in enumerate([turns[0][:5], short[0][:1]]):
        assert ids[row][: len(prompt)] == prompt
        assert labels[row][: len(prompt)] == [-100] * len(prompt)
        assert labels[row][len(prompt) : lengths[row]] == ids[row][len(prompt) : lengths[row]]
        assert set(labels[row][lengths[row] :]) <= {-100}
    assert len(prompt) < lengths[1] <= 1 + 6
    assert 5 < lengths[0] <= 9, "max_length holds for each row"
    assert set(labels[2]) == {-100}, "a row whose response was cut away gets none"


def test_a_sample_ends_with_its_end_token_and_is_drawn_from_the_model(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any
) -> None:
    """One prompt, 4000 samples of at most two tokens, against the model's own probabilities."""
    model = tiny_model(tie_word_embeddings=False)
    end, other = tiny_tokenizer.eos_token_id, 40
    with torch.no_grad():  # two tokens carry all the mass, so that counting is enough
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = 0.1 * torch.randn(64)
        bias = torch.full((320,), -50.0)
        bias[[end, other]] = torch.tensor([0.3, 0.0])
    model.lm_head.bias = torch.nn.Parameter(bias)
    model.generation_config.top_k = 1  # a checkpoint's own settings are left out
    prompt = ([11, 12, 40], [-100, -100, 40])
    sampled = sample_responses(
        model, tiny_tokenizer, as_batch([prompt] * 4000), max_length=None, max_new_tokens=2
    )
    with torch.no_grad():
        chances = [
            float(model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[end])
            for ids in ([11, 12], [11, 12, other])
        ]
    expected = {
        (end,): chances[0],
        (other, end): (1 - chances[0]) * chances[1],
        (other, other): (1 - chances[0]) * (1 - chances[1]),
    }
    found = [tuple(token for token in row if token != -100) for row in sampled["labels"].tolist()]
    assert set(found) == set(expected)
    for response, chance in expected.items():
        error = math.sqrt(chance * (1 - chance) / 4000)
        assert found.count(response) / 4000 == pytest.approx(chance, abs=4 * error)


def test_a_row_without_a_prompt_is_refused(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any
) -> None:
    with pytest.raises(DataError, match="rollouts answer prompts"):
        sample_responses(
            tiny_model(),
            tiny_tokenizer,
            as_batch([([11, 12], [11, 12])]),
            max_length=9,
            max_new_tokens=None,
        )


def test_a_sampled_step_is_equation_6_on_the_samples(
    make_trainer: Callable[..., Any], modules: Modules
) -> None:
    """Over two batches of a step: the denominator is what was sampled, not what the data had."""
    trainer = make_trainer(
        make_rows(8), per_device_train_batch_size=4, gradient_accumulation_steps=2, **ON_POLICY
    )
    seen = keep_batches(trainer)
    found = step(trainer)
    rows = [
        {"input_ids": ids[attended].tolist(), "labels": labels[attended].tolist()}
        for batch in seen
        for ids, attended, labels in zip(
            batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True
        )
    ]
    student = copy.deepcopy(modules.reference).double().eval().requires_grad_(True)
    teachers = [copy.deepcopy(model).double() for model in modules]
    loss = dense_loss(student, *teachers, rows, 2.0)
    loss.backward()
    assert_same(found, {n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    log = trainer.state.log_history[0]
    assert log["divergence"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert log["tokens_seen"] == sum(len(row["input_ids"]) for row in rows)
    data = make_rows(8)
    assert [row["input_ids"] for row in rows] != data["input_ids"]


def test_trls_distillation_loss_fed_with_the_joined_teacher_is_ours(modules: Modules) -> None:
    student = copy.deepcopy(modules.aligned)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    ids = torch.arange(20, 44).reshape(2, 12)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 3:9], mask[1, 5:] = True, True
    models = (student, *modules)
    hidden = [last_hidden(model, input_ids=ids).detach() for model in models]
    heads = [Head.of(model).weight.detach() for model in models]
    ours = fused_divergence(
        *(part for pair in zip(hidden, heads, strict=True) for part in pair), mask, 2.0
    )
    theirs, *_ = _chunked_divergence_loss(
        hidden[0],
        concatenate_hidden(hidden[1], hidden[2], 2.0),
        heads[0],
        torch.cat(heads[1:], dim=1),
        mask,
        beta=1.0,
    )
    torch.testing.assert_close(ours, theirs)


def test_the_share_of_sampled_batches_follows_from_the_seed(
    make_trainer: Callable[..., Any],
) -> None:
    def sampled(seed: int) -> list[bool]:
        trainer = make_trainer(
            make_rows(40),
            **ON_POLICY | {"rollouts": 0.5},
            per_device_train_batch_size=2,
            gradient_accumulation_steps=5,
            learning_rate=0.0,
            max_steps=12,
            seed=seed,
        )
        seen = keep_batches(trainer)
        trainer.train()
        return ["sampled" in batch for batch in seen]

    marks = sampled(0)
    assert marks == [
        random.Random(f"0 {step} {index}").random() < 0.5
        for step in range(12)
        for index in range(5)
    ]
    assert 15 < sum(marks) < 45
    assert sampled(1) != marks


@pytest.mark.parametrize("objective", ["token", "sequence"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "shared-lora"])
def test_stopped_and_resumed_is_uninterrupted(
    make_trainer: Callable[..., Any],
    modules: Modules,
    adapter_folder: tuple[Path, Path],
    tmp_path: Path,
    objective: str,
    adapter: bool,
) -> None:
    peft = {"peft_config": lora(lora_dropout=0.1)} if adapter else {}

    def run(name: str, stop: int | None = None, resume: bool = False) -> Any:
        models = {"model": student(modules), "aligned": modules.aligned}
        if adapter:
            models = dict(zip(("reference", "aligned"), map(str, adapter_folder), strict=True))
        trainer = make_trainer(
            make_rows(40),
            models=models,
            callbacks=[_StopAfter(stop)] if stop else None,
            **peft,
            **RUN | ON_POLICY | {"rollouts": 0.6, "output_dir": str(tmp_path / name)},
            rollout_objective=objective,
            activation_checkpointing=True,
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    whole = run("whole")
    run("parts", stop=4)
    torch.manual_seed(99)
    resumed = run("parts", resume=True)
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    logs = [trainer.state.log_history[4:6] for trainer in (whole, resumed)]
    for key in ("tokens_seen", "divergence", "grad_norm"):
        assert [log[key] for log in logs[0]] == [log[key] for log in logs[1]], key


def test_an_objective_of_samples_reaches_sampled_batches_alone(
    make_trainer: Callable[..., Any],
) -> None:
    def gradients(objective: str, rollouts: float) -> dict[str, torch.Tensor]:
        options = ON_POLICY | {"rollouts": rollouts, "rollout_objective": objective}
        return step(make_trainer(make_rows(8), **options))

    sampled = {name: gradients(name, 1.0) for name in ("token", "sequence", "sampled")}
    name = "model.embed_tokens.weight"
    for one, other in itertools.combinations(sampled.values(), 2):
        assert (one[name] - other[name]).norm() > 0.01 * one[name].norm()
    on_data = step(make_trainer(make_rows(8), max_length=ON_POLICY["max_length"]))
    for objective in ("sequence", "sampled"):
        unused = gradients(objective, 1e-9)  # a batch in 10⁹ is sampled, so none here
        assert all(torch.equal(part, unused[key]) for key, part in on_data.items())


def test_an_evaluation_is_of_the_data(make_trainer: Callable[..., Any], modules: Modules) -> None:
    rows = make_rows(8)
    trainer = make_trainer(rows, eval_dataset=rows, **ON_POLICY)
    teachers = [copy.deepcopy(model).double() for model in modules]
    expected = dense_loss(teachers[0], *teachers, rows, 2.0)
    assert trainer.evaluate()["eval_divergence"] == pytest.approx(float(expected), rel=1e-4)


def test_a_row_that_ends_before_its_response_costs_nothing(
    make_trainer: Callable[..., Any],
) -> None:
    empty = {"input_ids": [11, 12, 13], "labels": [-100, -100, -100]}
    trainer = make_trainer(
        Dataset.from_list([empty] * 8),
        dataset_kwargs={"skip_prepare_dataset": True},
        **ON_POLICY,
    )
    assert not any(gradient.any() for gradient in step(trainer).values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"packing": True}, "leave packing and padding_free out"),
        ({"max_length": None}, "set max_length or rollout_max_new_tokens"),
        ({"rollout_objective": "sentence"}, "one of token, sequence"),
        ({"rollout_max_new_tokens": 0}, "rollout_max_new_tokens"),
        ({"rollout_objective": "sequence", "divergence": "forward"}, "use divergence='reverse'"),
        ({"rollout_objective": "sampled", "divergence": "jsd"}, "use divergence='reverse'"),
        (
            {"rollout_objective": "sequence", "per_device_train_batch_size": 1},
            "per_device_train_batch_size to 2",
        ),
        ({"teacher": "cached", "cache_dir": "hidden"}, "no responses of the student"),
        ({"rollouts": 0, "rollout_objective": "sampled"}, "'sampled' without rollouts"),
        ({"rollouts": 0, "rollout_objective": "sequence"}, "'sequence' without rollouts"),
        ({"rollouts": 0, "rollout_max_new_tokens": 8}, "=8 without rollouts"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(
    settings: Callable[..., TrRaConfig], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        settings(**{"rollouts": 0.5, **options})
