"""TrRa whose two sides are one model under two prompts, against prompts rendered apart in float64."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from flexalign.data.prompting import PromptSettings
from flexalign.errors import ConfigError, DataError
from flexalign.lambdas import LambdaRange
from flexalign.models.prompted import PromptedModel, PromptPair
from flexalign.training import TrRaTrainer, realign
from flexalign.training.draws import LAMBDAS
from flexalign.training.pair_rows import (
    ALIGNED_PROMPT,
    PairRows,
    prompt_lengths,
    under_aligned_prompt,
)
from flexalign.training.recipes import RealignRecipe
from twin import divergence64, fuse64

from .conftest import VOCAB, lora
from .test_resume import _StopAfter
from .test_rollouts import keep_batches
from .test_trainer import assert_same, step

BRIEF = "answer in one short sentence"
PROMPTS = PromptPair(PromptSettings(), PromptSettings(system=BRIEF))

HYBRID = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if mode == 'off' %}<think>\n\n</think>\n\n{% elif mode == 'open' %}<think>\n{% endif %}"
    "{% endif %}"
)
"""A template whose prompt leaves the thinking free, opened or closed."""


def chats(count: int = 6) -> Dataset:
    """Questions and answers of different lengths."""
    words = ["one", "and", "two", "make", "three", "and", "three", "more", "make", "six"]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": " ".join(words[: 1 + number % 7])}],
                "completion": [
                    {"role": "assistant", "content": " ".join(words[number % 4 : 3 + number])}
                ],
            }
            for number in range(count)
        ]
    )


@pytest.fixture
def hybrid(tiny_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = HYBRID
    return tokenizer


@pytest.fixture
def one_model(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A model whose predictions depend on its prompt."""
    return tiny_model(initializer_range=0.2)


@pytest.fixture
def folder(tmp_path: Path, one_model: PreTrainedModel, tiny_tokenizer: Any) -> Path:
    path = tmp_path / "model"
    one_model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def make_prompted(
    one_model: PreTrainedModel, settings: Callable[..., Any], tiny_tokenizer: Any
) -> Callable[..., TrRaTrainer]:
    """A trainer of a student at the model, taught by the model under two prompts."""

    def make(
        rows: Any = None,
        prompts: PromptPair = PROMPTS,
        tokenizer: Any = tiny_tokenizer,
        peft_config: Any = None,
        callbacks: Any = None,
        eval_dataset: Any = None,
        **options: Any,
    ) -> TrRaTrainer:
        frozen = copy.deepcopy(one_model)
        start = {} if peft_config is not None else {"model": copy.deepcopy(one_model)}
        return TrRaTrainer(
            **start,
            reference=frozen,
            aligned=frozen,
            pair_rows=PairRows(tokenizer, prompts),
            args=settings(**{"per_device_train_batch_size": 6, **options}),
            train_dataset=chats() if rows is None else rows,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )

    return make


def rendered(tokenizer: Any, rows: Any, system: str | None, **arguments: Any) -> list[list[int]]:
    """The prompts' token ids, by the template alone."""
    first = [] if system is None else [{"role": "system", "content": system}]
    texts = [
        tokenizer.apply_chat_template(
            [*first, *row["prompt"]], tokenize=False, add_generation_prompt=True, **arguments
        )
        for row in rows
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def responses(tokenizer: Any, rows: Any) -> list[list[int]]:
    """The responses' token ids, each with its end token."""
    return [
        tokenizer(row["completion"][0]["content"], add_special_tokens=False)["input_ids"]
        + [tokenizer.eos_token_id]
        for row in rows
    ]


def naive_loss(
    student: Any,
    teacher: Any,
    asked: list[list[int]],
    told: list[list[int]],
    answers: list[list[int]],
    lam: float | list[float],
    divergence: str = "reverse",
    beta: float = 0.5,
    gate: float | None = None,
) -> torch.Tensor:
    """Equation 6 in float64, row by row: each side reads its own prompt and the same response."""

    def logits(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
        out = model(input_ids=torch.tensor([prompt + answer])).logits
        return out[0, len(prompt) - 1 : -1, :VOCAB]

    lams = lam if isinstance(lam, list) else [lam] * len(asked)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for one, other, answer, at in zip(asked, told, answers, lams, strict=True):
        with torch.no_grad():
            r, a = logits(teacher, one, answer), logits(teacher, other, answer)
        s = logits(student, one, answer)
        total = total + divergence64(s, fuse64(r, a, at, gate), divergence, beta).sum()
        count += len(answer)
    return total / count


def naive(model: Any, tokenizer: Any, rows: Any, lam: float, **options: Any) -> dict[str, Any]:
    """The loss and the gradients of a student at the model, under PROMPTS."""
    teacher, student = (copy.deepcopy(model).double().eval() for _ in range(2))
    student.requires_grad_(True)
    asked, told = rendered(tokenizer, rows, None), rendered(tokenizer, rows, BRIEF)
    loss = naive_loss(student, teacher, asked, told, responses(tokenizer, rows), lam, **options)
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {"loss": float(loss.detach()), "gradients": gradients}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lam": 1.0},
        {"divergence": "forward"},
        {"divergence": "jsd", "beta": 0.3},
        {"gate": 0.02},
        {"activation_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"chunk_size": 3},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=str,
)
def test_the_step_is_that_of_two_prompts_rendered_apart(
    make_prompted: Callable[..., TrRaTrainer],
    one_model: PreTrainedModel,
    tiny_tokenizer: Any,
    options: dict[str, Any],
) -> None:
    rows = chats()
    twin = {name: options[name] for name in ("divergence", "beta", "gate") if name in options}
    expected = naive(one_model, tiny_tokenizer, rows, options.get("lam", 2.0), **twin)
    trainer = make_prompted(rows, **options)
    found = step(trainer)
    assert_same(found, expected["gradients"])
    assert expected["loss"] > 1e-3
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_both_kl_are_to_the_model_under_its_own_prompt(
    make_prompted: Callable[..., TrRaTrainer], one_model: PreTrainedModel, tiny_tokenizer: Any
) -> None:
    trainer = make_prompted(eval_dataset=chats(3))
    measured = trainer.evaluate()
    # The untrained student is the reference, asked as the reference is.
    assert measured["eval_kl_reference"] == pytest.approx(0, abs=1e-6)
    expected = naive(one_model, tiny_tokenizer, chats(3), 1.0)["loss"]
    assert measured["eval_kl_aligned"] == pytest.approx(expected, rel=1e-4)


def test_equal_prompts_are_the_plain_pair(
    make_prompted: Callable[..., TrRaTrainer],
    one_model: PreTrainedModel,
    settings: Callable[..., Any],
    tiny_tokenizer: Any,
) -> None:
    rows = chats()
    both = PromptSettings(system=BRIEF)
    with pytest.warns(UserWarning, match="nothing to turn"):
        found = step(make_prompted(rows, PromptPair(both, both), lam=2.0, learning_rate=1.0))
    with pytest.warns(UserWarning, match="nothing to realign"):
        plain = TrRaTrainer(
            model=copy.deepcopy(one_model).requires_grad_(True),
            reference=one_model,
            aligned=one_model,
            args=settings(per_device_train_batch_size=6),
            train_dataset=both.apply(rows),
            processing_class=tiny_tokenizer,
        )
    for name, gradient in step(plain).items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-7, msg=name)


def test_a_response_is_cut_where_the_longer_side_ends(
    one_model: PreTrainedModel, tiny_tokenizer: Any
) -> None:
    rows = chats()
    asked, told = rendered(tiny_tokenizer, rows, None), rendered(tiny_tokenizer, rows, BRIEF)
    answers = responses(tiny_tokenizer, rows)
    cut = max(map(len, told)) + 4
    data = PairRows(tiny_tokenizer, PROMPTS).tokenize(rows, cut)
    for row, one, other, answer in zip(data, asked, told, answers, strict=True):
        kept = answer[: cut - len(other)]
        assert row["input_ids"] == one + kept
        assert row["completion_mask"] == [0] * len(one) + [1] * len(kept)
        assert row[ALIGNED_PROMPT] == other


# Batches.


@pytest.mark.parametrize("first", [3, 6, 9])
def test_the_responses_follow_the_other_prompt(first: int) -> None:
    ids = torch.tensor([[1, 2, 3, 50, 51, 0], [1, 60, 61, 62, 63, 64], [1, 2, 3, 0, 0, 0]])
    attended = torch.tensor([5, 6, 3])[:, None] > torch.arange(6)
    labels = torch.tensor([[-100] * 3 + [50, 51, -100], [-100, 60, 61, 62, 63, 64], [-100] * 6])
    prompts = torch.full((3, 9), -1)
    prompts[0, :first] = 7
    prompts[1, :2] = 8
    prompts[2, :4] = 9
    made = under_aligned_prompt(ids, attended.long(), labels[:, 1:] != -100, prompts)
    rows = [
        row[mask.bool()].tolist()
        for row, mask in zip(made.inputs["input_ids"], made.inputs["attention_mask"], strict=True)
    ]
    assert rows == [[7] * first + [50, 51], [8, 8, 60, 61, 62, 63, 64], [9] * 4]
    assert prompt_lengths(prompts).tolist() == [first, 2, 4]

    # A position is moved to the one that predicts the same token.
    hidden = made.inputs["input_ids"][..., None].float()
    moved = made.as_student(hidden)[..., 0]
    assert moved[0, 3:5].tolist() == [50, 51]
    assert moved[0, 2] == 7
    assert moved[1, 0] == 8
    assert moved[1, 1:6].tolist() == [60, 61, 62, 63, 64]


# Models in memory.


def test_a_lora_student_and_both_teachers_are_one_module(
    folder: Path, settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = _count_loads(monkeypatch)
    trainer = TrRaTrainer(
        reference=str(folder),
        aligned=PromptedModel(str(folder), PromptSettings(system=BRIEF)),
        args=settings(),
        train_dataset=chats(),
        peft_config=lora(),
    )
    assert len(loaded) == 1
    objective = trainer.objective
    assert objective.reference is objective.aligned
    assert objective.reference.model is trainer.model
    base = sum(parameter.numel() for parameter in loaded[0].parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    whole = {p.data_ptr(): p.numel() for p in trainer.model.parameters()}
    assert sum(whole.values()) == base  # the loaded module itself, with the LoRA in it
    assert trained < base / 2


def test_all_weights_need_one_frozen_model_beside_the_student(
    folder: Path, settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = _count_loads(monkeypatch)
    trainer = TrRaTrainer(
        reference=str(folder),
        aligned=PromptedModel(str(folder), PromptSettings(system=BRIEF)),
        args=settings(),
        train_dataset=chats(),
    )
    assert len(loaded) == 2
    assert trainer.objective.reference is trainer.objective.aligned
    assert trainer.objective.reference.model is not trainer.model
    assert not any(p.requires_grad for p in trainer.objective.reference.model.parameters())


def _count_loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from flexalign.models import loading, pair
    from flexalign.training import models

    loaded: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        loaded.append(loading.load_model(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(pair, "load_model", load)
    monkeypatch.setattr(models, "load_model", load)
    return loaded


def test_a_lora_students_step_is_the_naive_one(
    make_prompted: Callable[..., TrRaTrainer], one_model: PreTrainedModel, tiny_tokenizer: Any
) -> None:
    rows = chats()
    trainer = make_prompted(rows, peft_config=lora(), learning_rate=0.3, max_steps=3)
    trainer.train()
    student = copy.deepcopy(trainer.model).merge_and_unload().double()
    asked, told = rendered(tiny_tokenizer, rows, None), rendered(tiny_tokenizer, rows, BRIEF)
    expected = naive_loss(
        student,
        copy.deepcopy(one_model).double(),
        asked,
        told,
        responses(tiny_tokenizer, rows),
        2.0,
    )
    measured = trainer.evaluate(trainer.train_dataset)
    before = naive(one_model, tiny_tokenizer, rows, 2.0)["loss"]
    assert float(expected.detach()) < 0.95 * before
    assert measured["eval_divergence"] == pytest.approx(float(expected.detach()), rel=1e-4)


# On-policy.


@pytest.mark.parametrize("objective", ["token", "sequence", "sampled"])
def test_the_teachers_score_a_sample_under_their_own_prompts(
    make_prompted: Callable[..., TrRaTrainer],
    one_model: PreTrainedModel,
    tiny_tokenizer: Any,
    objective: str,
) -> None:
    rows = chats()
    trainer = make_prompted(
        rows,
        rollouts=1.0,
        rollout_objective=objective,
        rollout_max_new_tokens=5,
        max_length=128,
        per_device_train_batch_size=3,
    )
    seen = keep_batches(trainer)
    trainer.train()
    (batch,) = seen
    told = [row[row >= 0].tolist() for row in batch[ALIGNED_PROMPT]]
    asked, answers = [], []
    for ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True
    ):
        begins = int((labels != -100).int().argmax())
        asked.append(ids[:begins].tolist())
        answers.append(ids[begins : int(mask.sum())].tolist())
    assert all(one in rendered(tiny_tokenizer, rows, None) for one in asked)
    for one, other in zip(asked, told, strict=True):
        number = rendered(tiny_tokenizer, rows, None).index(one)
        assert other == rendered(tiny_tokenizer, rows, BRIEF)[number]

    twins = [copy.deepcopy(one_model).double() for _ in range(2)]
    expected = naive_loss(*twins, asked, told, answers, 2.0)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)


def test_a_sample_has_the_room_that_both_prompts_leave(
    make_prompted: Callable[..., TrRaTrainer], tiny_tokenizer: Any
) -> None:
    rows = chats(2)
    told = rendered(tiny_tokenizer, rows, BRIEF)
    cut = max(map(len, told)) + 3
    trainer = make_prompted(
        rows, rollouts=1.0, max_length=cut, per_device_train_batch_size=2, learning_rate=0.0
    )
    seen = keep_batches(trainer)
    trainer.train()
    counts = (seen[0]["labels"] != -100).sum(1) + prompt_lengths(seen[0][ALIGNED_PROMPT])
    assert int(counts.max()) == cut


# A range of λ.


def test_a_dial_of_two_prompts_learns_equation_5_at_each_rows_lambda(
    make_prompted: Callable[..., TrRaTrainer], one_model: PreTrainedModel, tiny_tokenizer: Any
) -> None:
    rows = chats()
    trainer = make_prompted(rows, peft_config=lora(), lam={"low": 0.0, "high": 3.0})
    assert trainer.lambda_range == LambdaRange(0.0, 3.0)
    seen = keep_batches(trainer)
    trainer.train()
    (batch,) = seen
    asked, told = rendered(tiny_tokenizer, rows, None), rendered(tiny_tokenizer, rows, BRIEF)
    order = [
        asked.index(ids[: int((labels != -100).int().argmax())].tolist())
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    answers = responses(tiny_tokenizer, rows)
    twins = [copy.deepcopy(one_model).double() for _ in range(2)]  # a new LoRA changes nothing
    expected = naive_loss(
        *twins,
        [asked[number] for number in order],
        [told[number] for number in order],
        [answers[number] for number in order],
        batch[LAMBDAS].double().tolist(),
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)


# Runs.


def run_of(folder: Path, output: Path, **options: Any) -> dict[str, Any]:
    return {
        "reference": str(folder),
        "aligned": {"model": str(folder), "system": BRIEF},
        "output": str(output),
        "lambda": 2.0,
        "data": "rows.jsonl",
        **options,
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "max_length": 128,
            "activation_checkpointing": False,
            "logging_steps": 1,
            **options.get("training", {}),
        },
    }


def weights(output: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = output.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_cached_run_is_the_online_run(folder: Path, tmp_path: Path, adapter: bool) -> None:
    extra = {"lora": {"r": 4}} if adapter else {}
    recipes = {
        teacher: run_of(folder, tmp_path / teacher, teacher=teacher, **extra)
        for teacher in ("online", "cached")
    }
    for recipe in recipes.values():
        realign(recipe, data=chats())
    online, cached = (weights(tmp_path / teacher) for teacher in recipes)
    assert online.keys() == cached.keys()
    for name, weight in online.items():
        torch.testing.assert_close(cached[name], weight, rtol=1e-4, atol=1e-5, msg=name)

    manifest = json.loads((tmp_path / "cached-cache" / "manifest.json").read_text())
    assert manifest["prompts"] == {"reference": {}, "aligned": {"system": BRIEF}}
    assert manifest["heads"]["aligned"]["shared"]
    other = run_of(folder, tmp_path / "third", teacher="cached", **extra) | {
        "aligned": {"model": str(folder), "system": "be long"},
        "cache_dir": str(tmp_path / "cached-cache"),
    }
    with pytest.raises(ConfigError, match="the prompts of the two sides"):
        realign(other, data=chats())
    plain = other | {"aligned": str(folder), "output": str(tmp_path / "fourth")}
    with pytest.raises(ConfigError, match="the prompts of the two sides"):
        realign(plain, data=chats())


@pytest.mark.parametrize(
    "case",
    [{}, {"lora": {"r": 4, "lora_dropout": 0.1}}, {"rollouts": 0.5, "rollout_max_new_tokens": 6}],
    ids=["full", "lora", "rollouts"],
)
def test_stopped_and_resumed_is_uninterrupted(
    folder: Path, tmp_path: Path, case: dict[str, Any]
) -> None:
    training = {"save_steps": 2, "save_total_limit": None}
    for name in ("whole", "parts"):
        recipe = run_of(folder, tmp_path / name, training=training, **case)
        if name == "parts":
            with pytest.raises(Exception, match="checkpoint-2"):
                realign(recipe, data=chats(), callbacks=[_Broken()])
        realign(recipe, data=chats())
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


class _Broken(_StopAfter):
    """A fault after the second checkpoint's step."""

    def __init__(self) -> None:
        super().__init__(10**6)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise RuntimeError("broken after checkpoint-2")


def test_another_prompt_is_another_run(folder: Path, tmp_path: Path) -> None:
    recipe = run_of(folder, tmp_path / "out")
    realign(recipe, data=chats())
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["prompts"] == {"reference": {}, "aligned": {"system": BRIEF}}
    other = recipe | {"aligned": {"model": str(folder), "system": "be long"}}
    with pytest.raises(ConfigError, match="prompts"):
        realign(other, data=chats())


def test_the_student_keeps_and_tells_the_references_prompt(
    folder: Path, tmp_path: Path, hybrid: Any
) -> None:
    from transformers import AutoTokenizer

    hybrid.save_pretrained(folder)
    recipe = run_of(folder, tmp_path / "out") | {
        "reference": {"model": str(folder), "system": "be kind", "template": {"mode": "free"}},
        "aligned": {"model": str(folder), "template": {"mode": "off"}},
    }
    realign(recipe, data=chats())
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "be kind" in card
    assert "'mode': 'free'" in card
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    question = [{"role": "user", "content": "one"}]
    text = saved.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")


def test_a_dials_file_tells_how_its_base_is_asked(
    folder: Path, tmp_path: Path, hybrid: Any
) -> None:
    hybrid.save_pretrained(folder)
    recipe = run_of(folder, tmp_path / "out", lora={"r": 4}) | {
        "reference": {"model": str(folder), "system": "be kind", "template": {"mode": "open"}},
        "aligned": {"model": str(folder), "template": {"mode": "off"}},
        "system": "you add numbers",
        "lambda": {"low": 0.0, "high": 2.0},
    }
    with pytest.warns(UserWarning, match="row 1 and 5 more: the aligned prompt has closed"):
        realign(recipe, data=chats())
    told = json.loads((tmp_path / "out" / "lora_dial.json").read_text())["rendering"]
    assert told["arguments"] == {"mode": "open"}
    assert told["system"] == "you add numbers\n\nbe kind"


def test_a_second_round_aligns_with_the_student_asked_as_the_reference(
    folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    realign(run_of(folder, output, rounds=2, lora={"r": 4}), data=chats())

    plain = run_of(folder, tmp_path / "plain", lora={"r": 4}) | {"aligned": str(output / "round-1")}
    realign(plain, data=chats())
    again, expected = weights(output), weights(tmp_path / "plain")
    for name, weight in expected.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=1e-6, msg=name)


def test_several_lambdas_share_a_cache_of_both_prompts(folder: Path, tmp_path: Path) -> None:
    recipe = run_of(folder, tmp_path / "out", teacher="cached", lora={"r": 4})
    outcome = realign(recipe | {"lambda": [1.0, 2.0]}, data=chats())
    assert [student.steps for student in outcome.students] == [4, 4]
    assert (tmp_path / "out-cache" / "manifest.json").exists()


def test_a_dry_run_shows_both_prompts(folder: Path, tmp_path: Path) -> None:
    plan = realign(run_of(folder, tmp_path / "out"), data=chats(), dry_run=True)
    assert BRIEF in plan.samples[0]["aligned"]
    assert BRIEF not in plan.samples[0]["masked"]
    assert plan.facts["aligned"] == {"model": str(folder), "system": BRIEF}
    lora_plan = realign(run_of(folder, tmp_path / "out", lora={"r": 4}), data=chats(), dry_run=True)
    assert lora_plan.facts["memory_gib"]["weights"] < plan.facts["memory_gib"]["weights"]


# The rows' prompts.


def test_a_sampled_response_carries_the_references_message(tiny_tokenizer: Any) -> None:
    prompts = PromptPair(PromptSettings(system="be kind"), PromptSettings(system=BRIEF))
    rows = PairRows(tiny_tokenizer, prompts)
    question = {"role": "user", "content": "one"}
    kind = {"role": "system", "content": "be kind"}
    row = {"prompt": [kind, question], "completion": "two", "response_ids": [20, 21]}
    made = rows.row(row)
    assert made.reference.prompt.ids == rendered(tiny_tokenizer, [row], None)[0]
    asked = [{"prompt": [question]}]
    assert made.aligned.ids == rendered(tiny_tokenizer, asked, BRIEF)[0]
    assert made.reference.response_ids == [20, 21, tiny_tokenizer.eos_token_id]

    with pytest.raises(DataError, match="row 4: its response was sampled without"):
        rows.row(row | {"prompt": [question]}, 4)


def test_a_rows_own_message_stays_before_each_sides(tiny_tokenizer: Any) -> None:
    common = PromptSettings(system="you add numbers")
    rows = PairRows(
        tiny_tokenizer,
        PromptPair(PromptSettings(system="be kind"), PromptSettings(system=BRIEF)),
        common=common,
    )
    row = {"prompt": [{"role": "user", "content": "one"}], "completion": "two"}
    made = rows.row(row)
    for found, system in ((made.reference.prompt.ids, "be kind"), (made.aligned.ids, BRIEF)):
        assert found == rendered(tiny_tokenizer, [row], f"you add numbers\n\n{system}")[0]
    again = rows.row(row | {"prompt": rows.with_system(row)})
    assert again.reference.prompt.ids == made.reference.prompt.ids
    assert again.aligned.ids == made.aligned.ids


@pytest.mark.parametrize(
    ("modes", "response", "doubt"),
    [
        (("free", "off"), "<think>\none\n</think>\n\ntwo", "has closed the thinking, and the"),
        (("free", "off"), "two", None),
        (("free", "open"), "<think>\none\n</think>\n\ntwo", "opens it again"),
        (("off", "open"), "two", "never closes it"),
        (("open", "free"), "one\n</think>\n\ntwo", "has not opened"),
        (("open", "open"), "one\n</think>\n\ntwo", None),
        (("off", "free"), "two", None),
    ],
)
def test_a_response_that_contradicts_the_aligned_opening_is_named(
    hybrid: Any, modes: tuple[str, str], response: str, doubt: str | None
) -> None:
    sides = [PromptSettings(template={"mode": mode}) for mode in modes]
    if sides[0] == sides[1]:
        sides[1] = PromptSettings(template={"mode": modes[1]}, system=BRIEF)
    rows = PairRows(hybrid, PromptPair(*sides))
    fine = [{"prompt": [{"role": "user", "content": "one"}], "completion": response}]
    row = rows.row(fine[0])
    asked = rendered(hybrid, fine, None, mode=modes[0])[0]
    assert row.reference.prompt.ids == asked
    assert row.aligned.ids == rendered(hybrid, fine, sides[1].system, mode=modes[1])[0]
    cautions = rows.survey(fine * 3).cautions()
    if doubt is None:
        assert cautions == []
    else:
        assert len(cautions) == 1
        assert cautions[0].startswith("row 1 and 2 more: ")
        assert doubt in cautions[0]


@pytest.mark.parametrize("side", ["reference", "aligned"])
def test_a_prompt_too_long_on_one_side_alone_is_refused(tiny_tokenizer: Any, side: str) -> None:
    long = PromptSettings(system="one and two make three " * 12)
    prompts = PromptPair(**{"reference": PromptSettings(), "aligned": PromptSettings(), side: long})
    rows = PairRows(tiny_tokenizer, prompts, limit=60)
    with pytest.raises(DataError, match=rf"row 3: its {side} prompt has \d+ tokens .* within 60"):
        rows.row(chats()[2], 3)
    PairRows(tiny_tokenizer, prompts, limit=600).row(chats()[2], 3)


def test_the_models_context_is_a_limit_too(folder: Path, tmp_path: Path) -> None:
    recipe = run_of(folder, tmp_path / "out", training={"max_length": 4096})
    recipe["aligned"]["system"] = "one and two make three " * 200
    with pytest.raises(DataError, match=r"row 1: its aligned prompt .* within 512"):
        realign(recipe, data=chats())
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:The `'keep_end'`:FutureWarning")
@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"packing": True}, "packing"),
        ({"padding_free": True}, "padding_free"),
        ({"completion_only_loss": False}, "completion_only_loss: false"),
        ({"assistant_only_loss": True}, "assistant_only_loss"),
        ({"truncation_mode": "keep_end"}, "truncation_mode: keep_end"),
    ],
)
def test_what_joins_rows_or_trains_on_prompts_is_refused(
    folder: Path, tmp_path: Path, training: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=rf"training\.{told}.* with two prompts"):
        RealignRecipe.parse(run_of(folder, tmp_path, training=training))


def test_rows_of_token_ids_need_the_aligned_prompt(tiny_tokenizer: Any) -> None:
    rows = PairRows(tiny_tokenizer, PROMPTS)
    ids = Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}])
    with pytest.raises(DataError, match=f"`{ALIGNED_PROMPT}`"):
        rows.tokenize(ids, None)
    with pytest.raises(DataError, match="row 1: the prompt is plain text"):
        rows.row({"prompt": "one", "completion": "two"})


# Recipes.


def test_a_recipe_keeps_its_sides(folder: Path, tmp_path: Path) -> None:
    recipe = RealignRecipe.parse(run_of(folder, tmp_path / "out"))
    assert recipe.reference == str(folder)
    assert recipe.aligned == PromptedModel(str(folder), PromptSettings(system=BRIEF))
    assert recipe.models == (str(folder), str(folder))
    assert recipe.prompts == PROMPTS
    again = RealignRecipe.parse(recipe.to_tree())
    assert again.prompts == recipe.prompts
    assert again.identity() == recipe.identity()
    plain = RealignRecipe.parse(run_of(folder, tmp_path / "out") | {"aligned": "other"})
    assert plain.prompts is None
    assert "prompts" not in plain.identity()


def test_a_recipe_names_what_contradicts(folder: Path, tmp_path: Path) -> None:
    tree = run_of(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"template\.mode is 'off' for both sides"):
        RealignRecipe.parse(
            tree
            | {
                "template": {"mode": "off"},
                "reference": {"model": str(folder), "template": {"mode": "open"}},
            }
        )
    with pytest.raises(ConfigError, match="aligned has the unknown key 'sytem'"):
        RealignRecipe.parse(tree | {"aligned": {"model": str(folder), "sytem": BRIEF}})
    unread = tree | {"aligned": {"model": str(folder), "template": {"mode": "off"}}}
    with pytest.raises(ConfigError, match="'mode', which the chat template does not read"):
        realign(unread, data=chats())


# The command line.


def test_realign_takes_the_sides_prompts_as_options(
    folder: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    rows = tmp_path / "rows.jsonl"
    chats().to_json(rows)
    tree = run_of(folder, tmp_path / "out") | {"data": str(rows)}
    del tree["aligned"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tree), encoding="utf-8")
    asked = ("--aligned-prompt", f"system={BRIEF}")
    result = run_cli("realign", recipe, *asked, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["aligned"] == {"model": str(folder), "system": BRIEF}
    assert plan["reference"] == str(folder)
    assert BRIEF in run_cli("realign", recipe, *asked, "--dry-run").stdout

    both = run_cli(
        "cache", recipe, *asked, "--reference-prompt", "system=be kind", "--dry-run", "--json"
    )
    assert both.exit_code == 0, both.stderr
    unread = run_cli("realign", recipe, "--aligned-prompt", "mode=off", "--dry-run")
    assert unread.exit_code == 2
    assert "'mode', which the chat template does not read" in unread.stderr


def test_a_side_without_prompt_in_the_form_of_a_mapping_is_its_model(folder: Path) -> None:
    recipe = RealignRecipe.parse(run_of(folder, folder) | {"aligned": {"model": "other"}})
    assert recipe.aligned == "other"
    assert recipe.prompts is None
