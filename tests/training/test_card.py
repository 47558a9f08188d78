from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from flexalign.training.card import model_card, versions_in_use
from flexalign.training.recipes import AdaptRecipe, BakeRecipe
from flexalign.training.recipes import RealignRecipe as Recipe
from stand_in_hub import cache_snapshot

FACTS = {"steps": 40, "tokens_seen": 123456, "pair": ["aaaa", "bbbb"], "data": "cccc"}
CURVE = [
    {
        "step": step,
        "prompts": 16,
        "tokens": tokens,
        "tokens_ci": [tokens - 1, tokens + 1],
        "truncated": 0.25,
        "accuracy": 0.75,
        "accuracy_ci": [0.5, 0.9],
    }
    for step, tokens in ((0, 99.0), (40, 61.5))
]


def _recipe(**changes: object) -> Recipe:
    tree = {"reference": "a", "aligned": "b", "data": "d.jsonl", "output": "o", "lambda": 2.0}
    return Recipe.parse(tree | {"gate": 0.01} | changes)


def _card(recipe: Recipe, **changes: object) -> str:
    given = {"command": "flexalign realign r.yaml", "facts": FACTS, "curve": CURVE}
    given |= {"round_number": 1, "effective": 2.0} | changes
    return model_card(recipe, **given)  # type: ignore[arg-type]


def test_the_card_says_what_was_made_from_what_and_how() -> None:
    recipe = _recipe()
    card = _card(recipe)
    for part in ("`a`", "`b`", "`2.0`", "reverse, KL(student‖teacher)", "0.01", "cccc", "aaaa"):
        assert part in card
    assert "| 0 | 99.0 [98.0, 100.0] | 25.0% | 0.750 [0.500, 0.900] |" in card
    assert "| 40 | 61.5 [60.5, 62.5] |" in card
    assert "flexalign realign r.yaml" in card
    assert versions_in_use()["torch"] in card


def test_header_and_recipe_in_the_card_are_yaml_that_loads() -> None:
    recipe = _recipe(lora={"r": 4})
    card = _card(recipe)
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "peft"
    assert "flexalign" in header["tags"]
    inside = card.split("```yaml\n")[1].split("```")[0]
    assert Recipe.parse(yaml.safe_load(inside)) == recipe


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexalign.training.card._PACKAGES", ("torch", "no-such-package"))
    assert set(versions_in_use()) == {"python", "torch"}


def test_a_dial_shows_its_curve_over_lambda() -> None:
    recipe = _recipe(**{"lambda": {"low": 0, "high": 5}, "lora": {"r": 4}})
    rows = [(0, 0.0, 99.0), (20, 1.0, 80.0), (20, 5.0, 60.0), (40, 1.0, 70.0), (40, 5.0, 41.5)]
    curve = [
        CURVE[0] | {"step": step, "lambda": lam, "tokens": tokens} for step, lam, tokens in rows
    ]
    card = _card(recipe, curve=curve, effective=None)
    over_lambda, learned = card.split("## The curve over λ")[1].split("## While it learned")
    found = [line.split(" | ")[:2] for line in over_lambda.splitlines() if line.startswith("| ")]
    assert [[cell.strip("| ").split(" ")[0] for cell in row] for row in found[2:]] == [
        ["0", "99.0"],
        ["1", "70.0"],
        ["5", "41.5"],
    ]
    assert learned.count("\n| 20 | ") == 2
    assert "every λ from 0 to 5" in card
    assert "LoRADial.from_pretrained" in card
    assert yaml.safe_load(card.split("---")[1])["tags"][-1] == "lora-dial"


def test_rounds_and_a_missing_curve_are_told_apart() -> None:
    card = _card(_recipe(rounds=2), curve=[], round_number=2, effective=4.0)
    assert "2 of 2; effective λ 4" in card
    assert "While it learned" not in card
    ungraded = [{k: v for k, v in row.items() if not k.startswith("acc")} for row in CURVE]
    assert "accuracy" not in _card(_recipe(), curve=ungraded)


# The header, as the hub reads it.

ADAPTED = {"steps": 3, "models": ["aaaa"], "data": "cccc", "measures": {"loss": 1.0}}


def _read(card: str, tmp_path: Path) -> Any:
    file = tmp_path / "README.md"
    file.write_text(card, encoding="utf-8")
    return ModelCard.load(file).data


def _base_at_hub(name: str, header: str) -> None:
    files = {"config.json": b"{}", "README.md": f"---\n{header}---\n# A base\n".encode()}
    cache_snapshot(name, files)


def test_the_hub_reads_what_a_student_was_made_from(tmp_path: Path) -> None:
    _base_at_hub("acme/open", "license: apache-2.0\n")
    watch = {"prompts": "questions.jsonl"}
    recipe = _recipe(reference="acme/open", data="acme/traces", output="out/mine", watch=watch)
    data = _read(_card(recipe), tmp_path)
    assert (data.base_model, data.base_model_relation) == ("acme/open", "finetune")
    assert (data.license, data.datasets) == ("apache-2.0", ["acme/traces"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["flexalign", "trl", "realignment", "trra"]
    assert data.model_name == "mine"
    told = {result.metric_type: result.metric_value for result in data.eval_results}
    assert told == {"accuracy": 0.75, "tokens": 61.5, "truncated": 0.25}
    assert data.eval_results[0] == EvalResult(
        task_type="text-generation",
        dataset_type="questions",
        dataset_name="questions.jsonl, its first 16 prompts",
        metric_type="accuracy",
        metric_value=0.75,
        metric_name="accuracy",
    )
    assert "Where it comes from" not in _card(recipe)


def test_a_dial_has_its_curve_in_the_header(tmp_path: Path) -> None:
    recipe = _recipe(
        **{"lambda": {"low": 0, "high": 5}, "lora": {"r": 4}}, watch={"prompts": "q.jsonl"}
    )
    rows = [(0, 0.0, 99.0), (20, 1.0, 80.0), (40, 5.0, 41.5), (40, 1.0, 70.0)]
    curve = [
        CURVE[0] | {"step": step, "lambda": lam, "tokens": tokens} for step, lam, tokens in rows
    ]
    data = _read(_card(recipe, curve=curve, effective=None), tmp_path)
    tokens = [one for one in data.eval_results if one.metric_type == "tokens"]
    assert [(one.metric_args["lambda"], one.metric_value) for one in tokens] == [
        (0.0, 99.0),
        (1.0, 70.0),
        (5.0, 41.5),
    ]
    assert tokens[2].metric_name == "tokens per answer at λ = 5"
    assert (data.library_name, data.tags[-1]) == ("peft", "lora-dial")


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("license: mit\n", {"license": "mit"}),
        (
            "license: other\nlicense_name: own\nlicense_link: LICENSE\n",
            {
                "license": "other",
                "license_name": "own",
                "license_link": "https://huggingface.co/acme/base-{n}/blob/main/LICENSE",
            },
        ),
        (
            "license: other\nlicense_link: https://example.org/l\n",
            {"license": "other", "license_link": "https://example.org/l"},
        ),
        ("tags: [x]\n", {}),
        ("license: [1, 2]\n", {}),
        ("{ no YAML\n", {}),
    ],
)
def test_the_licence_is_that_of_the_bases_card(
    header: str, wanted: dict[str, str], tmp_path: Path
) -> None:
    number = abs(hash(header))
    _base_at_hub(f"acme/base-{number}", header)
    recipe = AdaptRecipe.parse(
        {"base": f"acme/base-{number}", "data": "d.jsonl", "output": "out/fast"}
    )
    card = model_card(recipe, command="flexalign adapt", facts=ADAPTED)
    data = _read(card, tmp_path)
    found = {name: data.get(name) for name in ("license", "license_name", "license_link")}
    given = {name: value.replace("{n}", str(number)) for name, value in wanted.items()}
    assert {name: value for name, value in found.items() if value} == given
    assert ("names no licence" in card) == (not wanted)
    assert (data.base_model_relation, data.library_name) == ("adapter", "flexalign")


def test_what_the_hub_cannot_link_is_left_out_and_said(tmp_path: Path) -> None:
    card = _card(_recipe())
    data = _read(card, tmp_path)
    assert [data.get(name) for name in ("base_model", "license", "datasets")] == [None] * 3
    assert data.eval_results is None  # nothing was watched
    assert "The base, `a`, was not named by an id of the hub" in card
    assert "The card of the base, `a`, names no licence" in card


def test_a_merge_names_both_where_both_have_ids(tmp_path: Path) -> None:
    facts = {"task": "Merge", "models": ["aaaa", "bbbb"]}
    tree = {"base": "acme/whole", "adapter": "acme/dial", "lambda": 2.0, "output": "o"}
    data = _read(
        model_card(BakeRecipe.parse(tree), command="flexalign bake", facts=facts), tmp_path
    )
    assert (data.base_model, data.base_model_relation) == (["acme/whole", "acme/dial"], "merge")
    tree["adapter"] = "out/./dial"
    data = _read(
        model_card(BakeRecipe.parse(tree), command="flexalign bake", facts=facts), tmp_path
    )
    assert (data.base_model, data.base_model_relation) == ("acme/whole", "finetune")
