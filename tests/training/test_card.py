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


def test_rounds_and_a_missing_curve_are_told_apart() -> None:
    card = _card(_recipe(rounds=2), curve=[], round_number=2, effective=4.0)
    assert "2 of 2; effective λ 4" in card
    assert "While it learned" not in card
    ungraded = [{k: v for k, v in row.items() if not k.startswith("acc")} for row in CURVE]
    assert "accuracy" not in _card(_recipe(), curve=ungraded)
