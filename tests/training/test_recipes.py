from pathlib import Path
from typing import Any

import pytest
import yaml

from flexalign.errors import ConfigError, FlexAlignError, LambdaError
from flexalign.lambdas import LambdaRange
from flexalign.training.recipes import DEFAULT_TRAINING, AdaptRecipe, BakeRecipe
from flexalign.training.recipes import RealignRecipe as Recipe

MINIMAL: dict[str, Any] = {
    "reference": "models/a",
    "aligned": "models/b",
    "data": "traces.jsonl",
    "output": "out",
    "lambda": 2,
}


def _write(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_the_shortest_recipe_is_the_papers_run(tmp_path: Path) -> None:
    recipe = Recipe.load(_write(tmp_path, MINIMAL))
    assert recipe.lam == 2.0
    arguments = recipe.training_arguments(tmp_path)
    assert (arguments.max_steps, arguments.learning_rate) == (200, 2e-5)
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.get_warmup_steps(200) == 20
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 16
    assert arguments.divergence == "reverse"
    assert arguments.lam == 2.0
    assert not arguments.bf16
    assert recipe.peft_config() is None


def test_overrides_win_over_the_file_and_options_over_both(tmp_path: Path) -> None:
    path = _write(tmp_path, MINIMAL | {"training": {"max_steps": 5, "seed": 3}})
    recipe = Recipe.load(
        path,
        overrides=["training.max_steps=7", "lambda=1", "lora.r=2", "gate=0.01"],
        lam=3.0,
        output="elsewhere",
        merge=None,
    )
    assert recipe.training == {"max_steps": 7, "seed": 3}
    assert (recipe.lam, recipe.output, recipe.gate) == (3.0, "elsewhere", 0.01)
    lora = recipe.peft_config()
    assert (lora.r, lora.target_modules, lora.task_type) == (
        2,
        "all-linear",
        "CAUSAL_LM",
    )


def test_epochs_alone_decide_the_steps(tmp_path: Path) -> None:
    recipe = Recipe.parse(MINIMAL | {"training": {"num_train_epochs": 2}})
    arguments = recipe.training_arguments(tmp_path)
    assert (arguments.max_steps, arguments.num_train_epochs) == (-1, 2)


def test_yaml_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "training: {learning_rate: 2e-4}\n", encoding="utf-8")
    assert Recipe.load(path).training["learning_rate"] == 2e-4


def test_a_recipe_survives_its_own_yaml(tmp_path: Path) -> None:
    tree = MINIMAL | {
        "lambda": {"kind": "linear", "start": 0, "end": 2, "steps": 10},
        "lora": {"r": 4},
        "watch": {"prompts": "q.jsonl", "limit": 5},
        "training": {"max_steps": 9},
        "rounds": 2,
    }
    recipe = Recipe.parse(tree)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(again) == recipe
    assert recipe.identity() == Recipe.load(again).identity()


def test_whole_numbers_are_written_without_a_point() -> None:
    training = {"save_steps": 3, "learning_rate": 2e-5, "max_steps": 4, "logging_steps": 0.5}
    recipe = Recipe.parse(MINIMAL | {"lambda": 2, "chunk_size": 64, "training": training})
    lines = [line.strip() for line in recipe.to_yaml().splitlines()]
    assert {"lambda: 2", "save_steps: 3", "max_steps: 4", "logging_steps: 0.5"} <= set(lines)
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe


def test_what_only_shows_or_keeps_is_no_part_of_the_identity() -> None:
    plain = Recipe.parse(MINIMAL)
    shown = Recipe.parse(
        MINIMAL
        | {"output": "other", "training": {"logging_steps": 1, "save_steps": 2}}
        | {"watch": {"prompts": "q.jsonl"}}
    )
    assert plain.identity() == shown.identity()
    seeded = Recipe.parse(MINIMAL | {"training": {"seed": 1}})
    assert plain.identity() != seeded.identity()
    split = ("per_device_train_batch_size", "gradient_accumulation_steps")
    assert plain.identity()["training"] == {
        name: value
        for name, value in DEFAULT_TRAINING.items()
        if not name.startswith(("logging_", "save_", "report_to", *split))
    } | {"rows_per_step": 16}


def test_only_the_rows_of_a_step_count_not_over_what_they_are_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rows_per_step(rows: int, passes: int, processes: int) -> int:
        training = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}
        recipe = Recipe.parse(MINIMAL | {"training": training})
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", str(processes))
            return int(recipe.identity()["training"]["rows_per_step"])

    assert [rows_per_step(*split) for split in ((4, 2, 1), (1, 8, 1), (2, 2, 2))] == [8, 8, 8]
    assert rows_per_step(4, 2, 2) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refernce": "x"}, r"unknown key 'refernce'; did you mean 'reference'\?"),
        ({"base": "x"}, r"unknown key 'base'; it belongs to a recipe of flexalign adapt or bake\."),
        ({"lam": 2}, r"unknown key 'lam'; did you mean 'lambda'\?"),
        ({"training": {"max_stpes": 1}}, r"did you mean 'training\.max_steps'\?"),
        ({"lora": {"rank": 3}}, r"unknown key 'lora\.rank'; did you mean 'lora\.rank_pattern'\?"),
        (
            {"lora": {"layers_to_transform": [0], "target_modules": "q"}},
            r"^lora: .*layers_to_transform",
        ),
        ({"watch": {"promts": "x"}}, r"did you mean 'watch\.prompts'\?"),
        ({"watch": {"limit": 3}}, r"watch\.prompts is missing"),
        ({"watch": {"prompts": "q", "limit": 0}}, r"watch\.limit must be at least 1"),
        (
            {"watch": {"prompts": "q", "temperature": -0.5}},
            r"watch\.temperature must be a number ≥",
        ),
        ({"watch": {"prompts": "q", "temperature": ".nan"}}, r"watch\.temperature must be"),
        ({"watch": {"prompts": "q", "temperature": float("nan")}}, r"watch\.temperature must be"),
        ({"watch": "q"}, r"watch must be a mapping, got 'q'"),
        (
            {"training": {"zzz": 1}},
            r"unknown key 'training\.zzz'; none of the \d+ known is like it",
        ),
        ({"training": {"max_steps": "ten"}}, r"training\.max_steps must be a whole number"),
        ({"training": {"output_dir": "x"}}, "the recipe's `output`"),
        ({"training": {"save_total_limit": 1}}, "keep at least 2"),
        ({"training": {"save_only_model": True}}, "could not be resumed"),
        ({"training": {"lr_scheduler_type": "cosin"}}, "training: .*cosin"),
        ({"training": {"resume_from_checkpoint": "x"}}, "newest complete checkpoint in `output`"),
        ({"training": {"do_predict": True}}, "training.do_predict has no effect"),
        ({"training": {"cache_dir": "c"}}, "training.cache_dir has no effect: it is no field"),
        ({"training": {"eval_strategy": "steps"}}, "training.eval_strategy is about rows that are"),
        ({"training": {"eval_steps": 10}}, "training.eval_steps is about rows that are held out"),
        ({"lambda": None}, "lambda is missing.*or give --lambda"),
        ({"lambda": [1, 2]}, "one λ in a run"),
        ({"lambda": True}, "lambda must be a number or a mapping"),
        ({"lambda": {"kind": "linaer", "start": 0, "end": 1, "steps": 3}}, "linear"),
        ({"lambda": {"kind": "linear", "start": 0}}, "end"),
        ({"gate": 1.5}, "gate must be a number from 0 to 1"),
        ({"divergence": "revers"}, "divergence must be one of reverse, forward, jsd"),
        ({"by_id": True, "aligned": "models/a"}, "both sides are one; leave it out"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1"),
        ({"teacher": "cached", "rounds": 2}, "every round has another aligned"),
        ({"rollouts": 1.5}, "rollouts must be a number from 0 to 1"),
        ({"merge": True}, "merge is for a LoRA student"),
        (
            {"reference": 3},
            r"reference must be text, .* or a mapping \{model, system, template\}, got 3",
        ),
    ],
)
def test_mistakes_are_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.parse(MINIMAL | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lam", [float("nan"), float("inf"), "nan"])
def test_a_lambda_that_is_no_finite_number_is_refused(lam: Any) -> None:
    with pytest.raises(LambdaError, match="finite"):
        Recipe.parse(MINIMAL | {"lambda": lam})


def test_a_schedule_over_thinking_is_for_generation_only() -> None:
    schedule = {"kind": "thinking", "think": 0.0, "answer": 1.0}
    with pytest.raises(FlexAlignError, match="thinking"):
        Recipe.parse(MINIMAL | {"lambda": schedule})


def test_a_range_of_lambda_survives_its_own_yaml_and_identifies_the_run() -> None:
    recipe = Recipe.parse(MINIMAL | {"lambda": {"low": 0, "high": 5}, "lora": {"r": 4}})
    assert recipe.lambda_range == LambdaRange(0, 5)
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe
    assert recipe.identity()["lambda"] == {"low": 0.0, "high": 5.0}
    assert recipe.training_arguments().schedule == LambdaRange(0, 5)
    assert Recipe.parse(MINIMAL | {"lora": {"r": 4}}).lambda_range is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{low: 5, high: 0}", "lambda: a range of λ goes from low to a larger high"),
        ("{low: 0}", "lambda: a range of λ needs 'high'"),
        ("{low: a, high: 5}", "lambda: low must be a finite number"),
        ("1:5", "lambda: write a range as {low: 0, high: 5}, got '1:5'"),
    ],
)
def test_a_wrong_range_in_a_file_is_refused_by_its_key(
    tmp_path: Path, text: str, message: str
) -> None:
    path = _write(tmp_path, MINIMAL | {"lora": {"r": 4}})
    path.write_text(f"{path.read_text()}lambda: {text}\n")
    with pytest.raises(FlexAlignError) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(message)


def test_other_trainings_take_no_range() -> None:
    common = {"base": "b", "data": "d.jsonl", "output": "o", "lambda": {"low": 0, "high": 5}}
    with pytest.raises(ConfigError, match=r"a range \(0:5\) is for a LoRA of flexalign realign"):
        AdaptRecipe.parse(common | {"method": "trra", "aligned": "a"})
    with pytest.raises(ConfigError, match="lambda must be a number"):
        BakeRecipe.parse(common | {"adapter": "x"})
    with pytest.raises(ConfigError, match="lambda must be a number"):
        BakeRecipe.parse(common | {"adapter": "x", "lambda": LambdaRange(0, 5)})
    with pytest.raises(ConfigError, match="bake each λ into an output of its own"):
        BakeRecipe.parse(common | {"adapter": "x", "lambda": [1, 2]})


def test_a_gate_is_idle_where_no_lambda_leaves_the_ends() -> None:
    gated = MINIMAL | {"gate": 0.01}
    falling = {"kind": "linear", "start": 1, "end": -0.5, "steps": 9}
    inside = falling | {"end": 0}
    found = [Recipe.parse(gated | {"lambda": lam}).has_idle_gate for lam in (1, 2, falling, inside)]
    assert found == [True, False, False, True]
    assert not Recipe.parse(MINIMAL | {"lambda": 1}).has_idle_gate


def test_what_a_layer_adapters_run_does_not_read_is_refused() -> None:
    tree = {"base": "b", "data": "d.jsonl", "output": "o", "method": "trra", "aligned": "a"}
    tree |= {"lambda": 1}
    for key, value in (("rounds", 2), ("by_id", True), ("allow_pickle", True)):
        with pytest.raises(ConfigError, match=rf"training\.{key} has no effect"):
            AdaptRecipe.parse(tree | {"training": {key: value}})
    with pytest.raises(ConfigError, match=r"training\.do_eval is about rows that are held out"):
        AdaptRecipe.parse(
            tree
            | {"method": "sft", "aligned": None, "lambda": None}
            | {"training": {"do_eval": True}}
        )


def test_rows_that_bake_holds_out_are_evaluated_when_the_recipe_says(tmp_path: Path) -> None:
    tree = {"base": "b", "adapter": "a", "lambda": 0.5, "data": "d.jsonl", "output": "o"}
    recipe = BakeRecipe.parse(tree | {"training": {"eval_strategy": "steps", "eval_steps": 10}})
    assert recipe.training_arguments(tmp_path).eval_steps == 10


def test_a_list_of_lambda_is_a_recipe_for_each(tmp_path: Path) -> None:
    path = _write(tmp_path, MINIMAL | {"lambda": [0.5, 2], "teacher": "cached"})
    first, second = Recipe.load_each(path, output="out/r/")
    assert (first.lam, first.output) == (0.5, "out/r/lambda=0.5")
    assert (second.lam, second.output) == (2, "out/r/lambda=2")
    for each in (first, second):
        assert each.cache_folder == "out/r-cache"
        assert each.training_arguments(each.output).cache_dir == "out/r-cache"
    [one] = Recipe.load_each(path, lam=1.0, output="out/r")
    assert (one.output, one.cache_folder) == ("out/r", "out/r-cache")
    with pytest.raises(ConfigError, match="load_each"):
        Recipe.load(path)


def test_a_recipe_lists_every_field_once():
    with pytest.raises(TypeError, match=r"order and its fields differ: rank\."):

        class Longer(BakeRecipe):
            rank: int = 1


def test_of_several_missing_keys_the_first_listed_is_named():
    with pytest.raises(ConfigError, match="reference is missing"):
        Recipe.parse({})
    with pytest.raises(ConfigError, match="data is missing"):
        Recipe.parse({"reference": "a", "aligned": "b", "lambda": 1})
