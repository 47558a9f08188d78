"""`realign`, `adapt`, `bake` and `fill_cache` from Python: recipes of every form, no command line."""

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

import flexalign
from flexalign.errors import ConfigError, LambdaError
from flexalign.training import (
    AdaptRecipe,
    BakeRecipe,
    Events,
    RealignRecipe,
    StepObserver,
    Stopped,
    TrainingPlan,
    fill_cache,
)

TRAINING = {
    "max_steps": 2,
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "max_length": 64,
    "logging_steps": 1,
}


@pytest.fixture
def rows() -> list[dict[str, str]]:
    return [{"prompt": f"{n}+{n}=", "completion": f"again {n}</think> {2 * n}"} for n in range(8)]


@pytest.fixture
def tree(tmp_path: Path, tiny_pair: Any, rows: list[dict[str, str]]) -> dict[str, Any]:
    data = tmp_path / "traces.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "reference": str(tiny_pair.reference),
        "aligned": str(tiny_pair.aligned),
        "data": str(data),
        "output": str(tmp_path / "out"),
        "lambda": 2.0,
        "training": TRAINING,
    }


@pytest.fixture
def base(tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe of adapt."""
    kept = {key: tree[key] for key in ("data", "training")}
    return {"base": tree["reference"], "output": str(tmp_path / "adapter"), **kept}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


class Heard(Events):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.notes: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.steps: list[int] = []
        self.trainings: list[str] = []
        self.cautions: list[str] = []
        self.cached: list[int] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def note(self, line: str) -> None:
        self.notes.append(line)

    def caution(self, line: str) -> None:
        self.cautions.append(line)

    def measured(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    @contextmanager
    def training(self, name: str) -> Iterator[StepObserver]:
        steps = self.steps

        class Counts(StepObserver):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                steps.append(state.global_step)

        self.trainings.append(name)
        yield Counts()

    @contextmanager
    def filling(self, tokens: int) -> Iterator[Callable[[int], None]]:
        yield self.cached.append


class Signal(TrainerCallback):
    """Sends this process SIGINT in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            signal.raise_signal(signal.SIGINT)


def test_a_path_a_dictionary_and_a_recipe_are_one_run(tree: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "realign.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    heard = Heard()
    outcome = flexalign.realign(tree, events=heard)
    assert (outcome.output, outcome.steps, outcome.effective_lambda) == (tmp_path / "out", 2, 2.0)
    assert (heard.trainings, heard.steps) == (["steps"], [1, 2])
    for same in (path, str(path), RealignRecipe.parse(tree), [RealignRecipe.parse(tree)]):
        again = Heard()
        assert flexalign.realign(same, events=again) == outcome
        assert again.trainings == []  # it was done


def test_a_dry_run_is_a_plan_and_loads_nothing(
    tree: dict[str, Any], base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    plan = flexalign.realign(tree, dry_run=True)
    assert isinstance(plan, TrainingPlan)
    assert (plan.facts["steps"], plan.facts["output_state"]) == (2, "new")
    assert plan.samples[0]["masked"] == "0+0="
    assert flexalign.adapt(base, dry_run=True).facts["steps"] == 2
    assert not Path(tree["output"]).exists()
    assert not Path(base["output"]).exists()


def test_several_lambda_are_several_students_from_one_cache(tree: dict[str, Any]) -> None:
    tree |= {"lambda": [0.5, 2.0], "teacher": "cached"}
    heard = Heard()
    outcome = flexalign.realign(tree, events=heard)
    assert outcome.output == Path(tree["output"])
    assert [student.output.name for student in outcome.students] == ["lambda=0.5", "lambda=2"]
    assert [student.effective_lambda for student in outcome.students] == [0.5, 2.0]
    assert outcome.to_json() == json.loads((outcome.output / "report.json").read_text())
    assert heard.cached[-1] > 0
    assert "the 2 steps of a run see 50% of the rows" in heard.notes[0]
    assert len(list(Path(tree["output"] + "-cache").glob("shard-*.safetensors"))) == 1


def test_rounds_are_told_one_by_one(tree: dict[str, Any]) -> None:
    tree |= {"rounds": 2, "lambda": 1.5}
    heard = Heard()
    outcome = flexalign.realign(tree, events=heard)
    assert heard.trainings == ["round 1", "round 2"]
    assert outcome.effective_lambda == 2.25
    assert (outcome.output / "round-1" / "manifest.json").is_file()


def test_what_is_cautioned_and_refused(tree: dict[str, Any]) -> None:
    heard = Heard()
    flexalign.realign(tree | {"lambda": 5}, dry_run=True, events=heard)
    assert "without a gate" in heard.cautions[0]
    with pytest.warns(UserWarning, match="without a gate"):
        flexalign.realign(tree | {"lambda": 5}, dry_run=True)
    with pytest.raises(LambdaError, match="undoes its safety training"):
        flexalign.realign(tree | {"lambda": -1}, dry_run=True)
    flexalign.realign(tree | {"lambda": -1}, dry_run=True, extrapolate=True)
    with pytest.raises(ConfigError, match="did you mean 'reference'"):
        flexalign.realign(tree | {"refernce": "x"})
    with pytest.raises(ConfigError, match="takes a RealignRecipe, got a BakeRecipe"):
        flexalign.realign(BakeRecipe.parse({"base": "b", "adapter": "a", "data": "d"} | _where()))
    with pytest.raises(ConfigError, match="must be a mapping"):
        flexalign.realign(3)  # type: ignore[call-overload]


def _where() -> dict[str, Any]:
    return {"output": "o", "lambda": 0.5}


def test_a_signal_stops_after_a_checkpoint_and_the_same_call_goes_on(tree: dict[str, Any]) -> None:
    with pytest.raises(Stopped) as stopped:
        flexalign.realign(tree, callbacks=[Signal(1)])
    assert stopped.value.checkpoint.name == "checkpoint-1"
    heard = Heard()
    outcome = flexalign.realign(tree, events=heard)
    assert heard.lines == [f"going on from {stopped.value.checkpoint}"]
    assert heard.steps == [2]
    whole = flexalign.realign(tree | {"output": tree["output"] + "-whole"})
    for name, value in weights(whole.output).items():
        assert torch.equal(weights(outcome.output)[name], value), name


def test_the_student_is_watched(tree: dict[str, Any], tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "1+1=", "answer": "2"}\n', encoding="utf-8")
    tree["watch"] = {"prompts": str(questions), "every_steps": 1, "max_new_tokens": 4}
    heard = Heard()
    outcome = flexalign.realign(tree, events=heard)
    assert [row["step"] for row in heard.rows] == [0, 1, 2]
    assert outcome.curve == heard.rows
    assert "accuracy" in outcome.curve[0]


def test_a_cache_is_filled_for_students_of_any_lambda(tree: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="see 50% of the rows"):
        cache = fill_cache(tree)
    assert cache.folder == Path(tree["output"] + "-cache")
    made = {path: path.stat().st_mtime_ns for path in cache.folder.glob("shard-*")}
    outcome = flexalign.realign(tree | {"teacher": "cached", "lambda": 1.0}, events=Heard())
    assert outcome.effective_lambda == 1.0
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_rows_in_memory_take_the_place_of_a_file(
    tree: dict[str, Any], rows: Sequence[dict[str, str]]
) -> None:
    data = Dataset.from_list(list(rows))
    given = flexalign.realign(tree | {"data": "nowhere.jsonl"}, data=data)
    read = flexalign.realign(tree | {"output": tree["output"] + "-read"})
    for name, value in weights(read.output).items():
        assert torch.equal(weights(given.output)[name], value), name


def test_adapt_then_bake_from_recipes(base: dict[str, Any], tmp_path: Path) -> None:
    adapted = flexalign.adapt(AdaptRecipe.parse(base | {"strip_thinking": True}))
    assert adapted.steps == 2
    adapter = load_file(adapted.output / "inra_adapter.safetensors")
    assert adapted.trained_parameters == sum(tensor.numel() for tensor in adapter.values())
    baked = flexalign.bake(
        base
        | {"adapter": str(adapted.output), "lambda": 0.5, "output": str(tmp_path / "baked")}
        | {"held_out": 0.25}
    )
    assert {"held_out_divergence", "held_out_divergence_of_base", "loss"} == set(baked.measures)
    assert weights(baked.output)


def test_adapt_takes_a_recipe_or_a_base_not_both(base: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="method belongs into the recipe"):
        flexalign.adapt(base, method="sft")
    with pytest.raises(ConfigError, match="give data and output too"):
        flexalign.adapt(base["base"], output="out")
