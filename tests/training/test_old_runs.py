"""Folders of runs that were begun before recipes had one schema: they go on, or are refused by name.

Each ``run.json`` below is what that code wrote, but for the fingerprints.
"""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import flexalign
from flexalign.errors import ConfigError
from flexalign.training import AdaptRecipe, BakeRecipe, Events, RealignRecipe, Stopped

TRAINING = {
    "max_steps": 4,
    "learning_rate": "1e-3",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_length": 64,
    "save_steps": 2,
}
LINEAR = {"kind": "linear", "start": 0, "end": 2, "steps": 3}
LOSS = {"divergence": "reverse", "beta": 0.5, "gate": None, "chunk_size": 256}
DECISIVE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.1}
ROLLOUTS = {"rollouts": 0.0, "rollout_objective": "token", "rollout_max_new_tokens": None}
PAIR = {"reference": "a", "aligned": "b", "data": "d", "output": "o"}
BASE = {"base": "a", "data": "d", "output": "o"}

OLD: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (
        RealignRecipe,
        PAIR | {"lambda": 2, "training": TRAINING},
        {"lambda": 2.0, **LOSS, "teacher": "online", "rounds": 1, **ROLLOUTS, "lora": None}
        | {"training": {"max_steps": 4, "learning_rate": 0.001, **DECISIVE, "max_length": 64}},
    ),
    (
        RealignRecipe,
        PAIR
        | {"lambda": LINEAR, "gate": 0.01, "rounds": 2, "lora": {"r": 4}}
        | {"training": {"num_train_epochs": 2, "learning_rate": 1e-3}},
        {"lambda": LINEAR, **LOSS, "gate": 0.01, "teacher": "online", "rounds": 2, **ROLLOUTS}
        | {"lora": {"r": 4}}
        # Where epochs decide, that code wrote realign's 200 steps all the same.
        | {"training": {"max_steps": 200, "learning_rate": 0.001, **DECISIVE, "max_length": 8192}},
    ),
    (
        AdaptRecipe,
        BASE | {"strip_thinking": True, "training": TRAINING},
        {"method": "sft", "adapter_layers": 1, "strip_thinking": True, "lambda": None, **LOSS}
        | {"training": {"learning_rate": 0.001, **DECISIVE, "max_length": 64, "max_steps": 4}},
    ),
    (
        AdaptRecipe,
        BASE
        | {"method": "trra", "aligned": "c", "lambda": LINEAR, "training": {"num_train_epochs": 1}},
        {"method": "trra", "adapter_layers": 1, "strip_thinking": False, "lambda": LINEAR, **LOSS}
        | {"training": {"learning_rate": 2e-05, **DECISIVE, "max_length": 4096, "max_steps": -1}},
    ),
    (
        AdaptRecipe,
        BASE | {"method": "dpo", "training": {"beta": 0.2}},
        {"method": "dpo", "adapter_layers": 1, "strip_thinking": False, "lambda": None, **LOSS}
        | {"training": {"learning_rate": 2e-05, **DECISIVE, "max_length": 4096, "beta": 0.2}},
    ),
    (
        BakeRecipe,
        BASE | {"adapter": "x", "lambda": 0.5, "training": TRAINING},
        {"lambda": 0.5, "held_out": 0.05, **LOSS}
        | {"training": {"max_steps": 4, "learning_rate": 0.001, **DECISIVE, "max_length": 64}},
    ),
]


@pytest.mark.parametrize(("kind", "tree", "identity"), OLD)
def test_what_decides_the_weights_is_written_as_before(
    kind: Any, tree: dict[str, Any], identity: dict[str, Any]
) -> None:
    recipe = kind.parse(tree)
    found = recipe.identity()
    rows = found["training"].pop("rows_per_step")
    assert rows == (2 if "per_device_train_batch_size" in tree["training"] else 16)
    epochs = found["training"].pop("num_train_epochs", None)
    given = tree["training"].get("num_train_epochs")
    assert epochs == (given if given else 3 if kind is AdaptRecipe else None)
    assert found == identity


def test_a_recipe_that_was_written_down_is_read_again() -> None:
    tree = PAIR | {
        "lambda": {"kind": "constant", "start": 2},
        "watch": {"prompts": "q", "every_steps": 50, "limit": 5, "max_new_tokens": 512}
        | {"temperature": 1.0, "batch_size": 32},
        "training": {"learning_rate": 0.001, "save_steps": 2.0},
    }
    recipe = RealignRecipe.parse(tree)
    assert recipe.lam == 2.0
    assert RealignRecipe.parse(recipe.to_tree()) == recipe


class _Interrupt(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            signal.raise_signal(signal.SIGINT)


class _Lines(Events):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def begun(tmp_path: Path, tiny_pair: Any) -> dict[str, Any]:
    """A recipe whose run was stopped after step 2 and lies there as the earlier code left it."""
    data = tmp_path / "traces.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": f" {2 * n}"} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pair = {"reference": str(tiny_pair.reference), "aligned": str(tiny_pair.aligned)}
    tree = pair | {"data": str(data), "output": str(tmp_path / "out"), "training": TRAINING}
    tree["lambda"] = {"kind": "constant", "start": 2}
    with pytest.raises(Stopped):
        flexalign.realign(tree, callbacks=[_Interrupt()])
    note = tmp_path / "out" / "run.json"
    now = json.loads(note.read_text(encoding="utf-8"))
    before = OLD[0][2] | {key: now[key] for key in ("pair", "data")}
    before |= {"lambda": tree["lambda"], "round": 1}
    before["training"] = before["training"] | {"rows_per_step": 2}
    note.write_text(json.dumps(before, indent=2) + "\n", encoding="utf-8")
    return tree


def test_an_old_run_goes_on_from_its_checkpoint(begun: dict[str, Any]) -> None:
    events = _Lines()
    outcome = flexalign.realign(begun, events=events)
    assert outcome.steps == 4
    assert events.lines == [f"going on from {Path(begun['output']) / 'checkpoint-2'}"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lambda": 1.0}, "lambda was 2.0, now 1.0"),
        ({"lambda": LINEAR}, 'lambda was 2.0, now {"kind": "linear", "start": 0.0'),
        ({"gate": 0.01}, "gate was null, now 0.01"),
    ],
)
def test_an_old_run_of_something_else_is_refused_by_what_differs(
    begun: dict[str, Any], change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match="holds another run") as refused:
        flexalign.realign(begun | change)
    assert reason in str(refused.value)
