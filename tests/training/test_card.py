import pytest
import yaml

from flexalign.training.card import model_card, versions_in_use
from flexalign.training.recipes import RealignRecipe as Recipe

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
