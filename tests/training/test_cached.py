"""A cached teacher is the online one: the same losses and gradients, whatever the setting."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig

from flexalign.data import data_fingerprint
from flexalign.errors import ConfigError, DataError, PairMismatchError
from flexalign.models.loading import fingerprint, load_model
from flexalign.models.pair import ModelPair
from flexalign.training import TrRaTrainer
from flexalign.training.hidden_cache import (
    Form,
    HiddenStateCache,
    identity_of,
    prepare_documents,
    write_cache,
)
from flexalign.training.memory import Sizes, estimate_memory

from .conftest import BOTH_MODELS, BUFFERS, FUSED, Modules, lora, make_rows
from .test_trainer import VOCAB, assert_same, dense_loss, step, twin_gradients

WIDTH = 64


@pytest.fixture
def make_cache(
    tmp_path: Path, modules: Modules, settings: Callable[..., Any], tiny_tokenizer: Any
) -> Callable[..., HiddenStateCache]:
    def make(
        rows: Dataset,
        *,
        pair: Modules = modules,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> HiddenStateCache:
        args = settings(**options)
        prints = (fingerprint(pair.reference), fingerprint(pair.aligned))
        return write_cache(
            tmp_path / "cache",
            identity_of(prints, data_fingerprint(rows), tiny_tokenizer, args),
            lambda: prepare_documents(rows, tiny_tokenizer, args),
            lambda: ModelPair.of(pair.reference, pair.aligned, tiny_tokenizer),
            form=Form((WIDTH, WIDTH), VOCAB, False, dtype, torch.float32),
            shard_bytes=40 * 2 * WIDTH * dtype.itemsize,
        )

    return make


@pytest.fixture
def cached_trainer(
    tmp_path: Path,
    modules: Modules,
    settings: Callable[..., Any],
    tiny_tokenizer: Any,
) -> Callable[..., TrRaTrainer]:
    """A trainer with the teachers out of the folder that `make_cache` fills."""

    def make(rows: Dataset, *, peft_config: Any = None, eval_dataset: Any = None, **options: Any):
        args = settings(teacher="cached", cache_dir=str(tmp_path / "cache"), **options)
        return TrRaTrainer(
            model=copy.deepcopy(modules.reference).requires_grad_(True),
            args=args,
            train_dataset=rows,
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
        )

    return make


@pytest.mark.parametrize(
    "options",
    [
        {"lam": 0.0},
        {"lam": 5.0},
        {"lam": {"kind": "linear", "start": 0.5, "end": 2, "steps": 10}},
        {"divergence": "forward"},
        {"divergence": "jsd", "beta": 0.3},
        {"gate": 0.05},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"activation_checkpointing": True, "chunk_size": 3},
        {"dataloader_num_workers": 1},
        {"packing": True, "max_length": 64, "per_device_train_batch_size": 4},
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_the_online_teacher(
    make_trainer: Callable[..., Any],
    make_cache: Callable[..., HiddenStateCache],
    cached_trainer: Callable[..., Any],
    options: dict[str, Any],
) -> None:
    rows = make_rows(8)
    online = make_trainer(rows, **options)
    expected = step(online)
    make_cache(rows, **options)
    cached = cached_trainer(rows, **options)
    assert_same(step(cached), {name: grad.double() for name, grad in expected.items()})
    first, second = (trainer.state.log_history[0] for trainer in (online, cached))
    for name in ("loss", "divergence", "kl_reference", "kl_aligned", "lambda", "tokens_seen"):
        assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-7), name


def test_one_cache_gives_the_twins_gradient_at_every_lambda(
    modules: Modules,
    make_cache: Callable[..., HiddenStateCache],
    cached_trainer: Callable[..., Any],
) -> None:
    rows = make_rows(8)
    make_cache(rows)
    for lam in (0.5, 2.0, -1.0):
        assert_same(step(cached_trainer(rows, lam=lam)), twin_gradients(modules, rows, lam))


def test_several_steps_in_shuffled_order_stay_with_the_online_run(
    make_trainer: Callable[..., Any],
    make_cache: Callable[..., HiddenStateCache],
    cached_trainer: Callable[..., Any],
) -> None:
    rows = make_rows(12)
    options = {"max_steps": 7, "per_device_train_batch_size": 3, "learning_rate": 0.1}
    online = make_trainer(rows, **options)
    online.train()
    make_cache(rows, **options)
    cached = cached_trainer(rows, **options)
    cached.train()
    losses = [
        [log["loss"] for log in trainer.state.log_history if "loss" in log]
        for trainer in (online, cached)
    ]
    assert len(losses[0]) == 7
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_an_adapter_is_trained_without_any_teacher_in_memory(
    make_trainer: Callable[..., Any],
    make_cache: Callable[..., HiddenStateCache],
    cached_trainer: Callable[..., Any],
) -> None:
    rows = make_rows(8)
    online = make_trainer(rows, peft_config=lora(r=4))
    online.train()
    make_cache(rows)
    cached = cached_trainer(rows, peft_config=lora(r=4))
    cached.train()
    assert cached.state.log_history[0]["divergence"] == pytest.approx(
        online.state.log_history[0]["divergence"], rel=1e-5
    )
    base = sum(p.numel() for n, p in cached.model.named_parameters() if "lora" not in n)
    assert base == sum(p.numel() for p in make_trainer(rows).model.parameters())


def test_an_evaluation_reads_the_cache_too(
    modules: Modules,
    make_cache: Callable[..., HiddenStateCache],
    cached_trainer: Callable[..., Any],
) -> None:
    rows = make_rows(8)
    make_cache(rows)
    half = rows.select(range(4))
    trainer = cached_trainer(rows, eval_dataset=half, per_device_eval_batch_size=3)
    teachers = [copy.deepcopy(model).double() for model in modules]
    expected = dense_loss(teachers[0], *teachers, half, 2.0)
    assert trainer.evaluate()["eval_divergence"] == pytest.approx(
        float(expected.detach()), rel=1e-4
    )
    with pytest.raises(DataError, match="row 1 of eval_dataset is not in the cache"):
        cached_trainer(rows, eval_dataset=make_rows(2, seed=5))


def test_bfloat16_storage_costs_no_more_than_its_rounding(
    make_trainer: Callable[..., Any],
    make_cache: Callable[..., HiddenStateCache],
    cached_trainer: Callable[..., Any],
) -> None:
    rows = make_rows(8)
    exact = make_trainer(rows)
    gradients = step(exact)
    cache = make_cache(rows, dtype=torch.bfloat16)
    assert cache.facts["dtype"] == "bfloat16"
    rounded = cached_trainer(rows)
    found = step(rounded)
    loss, exact_loss = (t.state.log_history[0]["loss"] for t in (rounded, exact))
    assert loss == pytest.approx(exact_loss, rel=5e-3)
    assert loss != exact_loss

    def flat(named: dict[str, Tensor]) -> Tensor:
        return torch.cat([named[name].flatten() for name in sorted(named)])

    one, other = flat(found), flat(gradients)
    assert float((one - other).norm() / other.norm()) < 1e-2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_length": 16}, r"the cut-off max_length \(max_length was 1024, now 16\)"),
        ({"rows": make_rows(8, seed=3)}, "the data set"),
        ({"completion_only_loss": False}, "completion_only_loss"),
        ({"template": "{{ messages }}"}, "the chat template"),
    ],
    ids=["cut-off", "data", "mask", "template"],
)
def test_a_cache_of_something_else_is_refused_by_name(
    make_cache: Callable[..., HiddenStateCache],
    cached_trainer: Callable[..., Any],
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    named: str,
) -> None:
    rows = make_rows(8)
    make_cache(rows)
    other = change.pop("rows", rows)
    if template := change.pop("template", None):
        monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    with pytest.raises(ConfigError, match=named):
        cached_trainer(other, **change)


def test_a_cache_of_another_pair_is_refused_by_name(
    make_cache: Callable[..., HiddenStateCache],
    modules: Modules,
    settings: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    rows = make_rows(8)
    make_cache(rows)
    with pytest.raises(ConfigError, match=r"the pair \(pair was"):
        TrRaTrainer(
            reference=modules.reference,
            aligned=modules.reference,
            args=settings(teacher="cached", cache_dir=str(tmp_path / "cache")),
            train_dataset=rows,
            processing_class=tiny_tokenizer,
        )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache_dir": None}, "needs cache_dir"),
        ({"rounds": 2}, "every round has another aligned model"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "cuts documents"),
    ],
)
def test_what_a_cache_cannot_serve_is_refused(
    settings: Callable[..., Any], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        settings(**{"teacher": "cached", "cache_dir": "somewhere", **options})


@pytest.mark.parametrize("adapter", [None, lora(r=4)], ids=["full", "lora"])
def test_the_estimate_is_what_is_held(
    make_cache: Callable[..., HiddenStateCache],
    cached_trainer: Callable[..., Any],
    adapter: Any,
) -> None:
    rows = make_rows(8)
    make_cache(rows)
    trainer = cached_trainer(rows, peft_config=adapter)
    student = sum(p.numel() for p in trainer.model.parameters())
    heads = sum(head.weight.numel() for head in trainer.objective.heads)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    need = estimate_memory(
        trainer.model.config,
        Sizes(base=student if adapter is None else student - trained, trainable=trained),
        aligned_parameters=0,
        cached_heads=2,
        rows=1,
        tokens=8,
        chunk_size=8,
        half_precision=False,
        checkpointing=False,
    )
    assert need.weights == 4 * (student + heads)


def refused(
    settings: Callable[..., Any], folder: Path, reason: str, error: type = ConfigError, **given: Any
) -> None:
    with pytest.raises(error, match=reason):
        TrRaTrainer(args=settings(teacher="cached", cache_dir=str(folder)), **given)


@pytest.mark.parametrize(
    ("given", "options", "reason"),
    [
        ({"parts": object()}, {}, "leave model, reference, aligned, pair and peft_config out"),
        ({"cache": object()}, {}, "set teacher='cached', or leave cache out"),
        ({}, {"rounds": 2}, "rounds=2: a trainer runs one round; use flexalign.realign"),
    ],
)
def test_what_a_trainer_would_not_read_is_refused(
    settings: Callable[..., Any],
    given: dict[str, Any],
    options: dict[str, Any],
    reason: str,
) -> None:
    with pytest.raises(ConfigError, match=reason):
        TrRaTrainer(
            args=settings(**options),
            reference="nowhere/a",
            aligned="nowhere/b",
            train_dataset=Dataset.from_list([]),
            **given,
        )


def test_what_does_not_go_with_a_cache_is_said(
    make_cache: Callable[..., HiddenStateCache],
    modules: Modules,
    settings: Callable[..., Any],
    tiny_tokenizer: Any,
    adapter_folder: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    rows = make_rows(8)
    base, adapter = adapter_folder
    cache = make_cache(rows).folder
    given: dict[str, Any] = {"train_dataset": rows, "processing_class": tiny_tokenizer}
    pair = ModelPair.of(modules.reference, modules.aligned, tiny_tokenizer)
    refused(settings, cache, "leave pair out", pair=pair, **given)
    refused(settings, cache, "holds no model; give the student's start", **given)
    refused(settings, cache, "holds no model; give the student's start", train_dataset=rows)
    model = modules.reference
    refused(settings, cache, "give its tokenizer", model=model, train_dataset=rows)
    stream = {**given, "train_dataset": rows.to_iterable_dataset()}
    refused(settings, cache, "needs a data set that is there whole", model=model, **stream)
    peft = get_peft_model(copy.deepcopy(modules.aligned), lora())
    refused(settings, cache, "give an adapter as its folder", aligned=peft, model=model, **given)
    twice = {"model": adapter, "peft_config": lora(), **given}
    refused(settings, cache, "is an adapter already; leave out peft_config", **twice)
    other = shutil.copytree(base, tmp_path / "other")
    AutoConfig.from_pretrained(base).save_pretrained(other)
    wide = {"model": other, "reference": base, **given}
    changed = json.loads((other / "tokenizer.json").read_text())
    changed["model"]["vocab"] |= {"a": 66, "b": 65}
    (other / "tokenizer.json").write_text(json.dumps(changed))
    wide_error = (ConfigError, PairMismatchError)
    refused(settings, cache, "the pair|does not fit the reference", wide_error, **wide)


def test_an_adapter_folder_is_trained_on_without_teachers(
    make_cache: Callable[..., HiddenStateCache],
    settings: Callable[..., Any],
    tiny_tokenizer: Any,
    adapter_folder: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    base, adapter = adapter_folder
    rows = make_rows(8)
    make_cache(rows, pair=Modules(load_model(base), load_model(adapter).merge_and_unload()))
    trainer = TrRaTrainer(
        model=adapter,
        args=settings(teacher="cached", cache_dir=str(tmp_path / "cache"), lam=1.0),
        train_dataset=rows,
        processing_class=tiny_tokenizer,
    )
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    trainer.train()
    assert trainer.state.log_history[0]["divergence"] == pytest.approx(0, abs=1e-6)


def test_a_split_of_an_evaluation_is_named(
    make_cache: Callable[..., HiddenStateCache], cached_trainer: Callable[..., Any]
) -> None:
    rows = make_rows(8)
    make_cache(rows)
    splits = {"near": rows.select(range(2)), "far": make_rows(2, seed=5)}
    with pytest.raises(DataError, match="row 1 of eval_dataset far is not in the cache"):
        cached_trainer(rows, eval_dataset=splits)


def test_a_row_that_ends_before_its_response_needs_no_states(
    make_cache: Callable[..., HiddenStateCache],
    cached_trainer: Callable[..., Any],
    make_trainer: Callable[..., Any],
) -> None:
    empty = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    rows = Dataset.from_list([*make_rows(4).to_list(), empty])
    make_cache(rows)
    losses = []
    for trainer in (cached_trainer(rows), make_trainer(make_rows(4))):
        trainer.train()
        losses.append(trainer.state.log_history[0]["divergence"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_step_that_is_not_logged_makes_no_logits_of_either_teacher(
    make_cache: Callable[..., HiddenStateCache],
    cached_trainer: Callable[..., TrRaTrainer],
    watched: list[list[int]],
) -> None:
    rows = make_rows(8)
    make_cache(rows)
    cached_trainer(rows, max_steps=3, logging_steps=2).train()
    assert watched == [[BUFFERS], *2 * [[BUFFERS, BOTH_MODELS, FUSED]]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": 0.05, "divergence": "forward"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"packing": True, "max_length": 64, "per_device_train_batch_size": 4},
    ],
    ids=str,
)
def test_a_lambda_for_each_row_reads_the_cache_as_the_online_teacher_runs(
    modules: Modules,
    make_trainer: Callable[..., Any],
    make_cache: Callable[..., HiddenStateCache],
    cached_trainer: Callable[..., Any],
    options: dict[str, Any],
) -> None:
    rows = make_rows(8)
    options = {"lam": {"low": -0.5, "high": 3}, **options}
    peft_config = lora(r=4, init_lora_weights=False)
    models = {"reference": copy.deepcopy(modules.reference), "aligned": modules.aligned}
    online = make_trainer(rows, models=models, peft_config=peft_config, **options)
    expected = step(online)
    make_cache(rows, **options)
    cached = cached_trainer(rows, peft_config=lora(r=4, init_lora_weights=False), **options)
    assert_same(step(cached), {name: grad.double() for name, grad in expected.items()})
    first, second = (trainer.state.log_history[0] for trainer in (online, cached))
    for name in ("divergence", "divergence_high", "kl_reference", "lambda", "tokens_seen"):
        assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-7), name
