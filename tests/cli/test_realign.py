import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model

RunCli = Callable[..., Any]


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    path = tmp_path / "traces.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": f" {2 * n}, again {2 * n}"} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def tree(tmp_path: Path, tiny_pair: Any, traces: Path) -> dict[str, Any]:
    return {
        "reference": str(tiny_pair.reference),
        "aligned": str(tiny_pair.aligned),
        "data": str(traces),
        "output": str(tmp_path / "out"),
        "lambda": 2.0,
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_length": 64,
        },
    }


@pytest.fixture
def realign(tmp_path: Path, run_cli: RunCli) -> Callable[..., Any]:
    def run(tree: dict[str, Any], *options: object) -> Any:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return run_cli("realign", path, *options)

    return run


@pytest.mark.usefixtures("weightless")
def test_a_dry_run_shows_what_is_trained_on_and_writes_nothing(
    realign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    result = realign(tree, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "0+0=« 0, again 0<|im_end|>»" in result.stdout
    assert "1+1=« 2, again 2<|im_end|>»" in result.stdout
    assert "3 of 2 rows" in result.stdout
    assert not Path(tree["output"]).exists()


@pytest.mark.usefixtures("weightless")
def test_a_negative_lambda_is_trained_towards_when_it_is_meant(
    realign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    result = realign(tree, "--dry-run", "--json", "--lambda", "-0.5", "--extrapolate")
    assert json.loads(result.stdout)["lambda"] == -0.5


@pytest.mark.usefixtures("weightless")
def test_a_schedule_may_come_from_the_command_line(
    realign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    schedule = {"kind": "linear", "start": 0, "end": 2, "steps": 3}
    result = realign(tree, "--dry-run", "--json", "--lambda", json.dumps(schedule))
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["lambda"] == schedule


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--lambda", "20"), "λ of 20 without"),
        (("--lambda", "1,5,2"), "λ of 5 without"),
        (("--lambda", "2.5", "--set", "rounds=2", "--extrapolate"), "an effective λ of 6.25"),
        (("--lambda", '{"kind": "linear", "start": 0, "end": 9, "steps": 2}'), "λ of 9 without"),
        (("--lambda", '{"kind": "linear", "start": 9, "end": 4, "steps": 2}'), None),
        (("--lambda", "20", "--set", "gate=0.01"), None),
        (("--lambda", "2", "--set", "rounds=2"), None),
        (("--lambda", "4"), None),
        (("--lambda", "0:5", "--set", "lora.r=4"), "λ of 5 without"),
        (("--lambda", "0:5", "--set", "lora.r=4", "--set", "gate=0.01"), None),
    ],
)
def test_far_extrapolation_without_a_gate_is_cautioned_of_once(
    realign: Callable[..., Any], tree: dict[str, Any], options: tuple[str, ...], told: str | None
) -> None:
    result = realign(tree, "--dry-run", "--json", *options)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("caution: ") == (told is not None)
    if told is not None:
        assert told in result.stderr
        command = f"flexalign inspect {tree['reference']} {tree['aligned']} --diff {tree['data']}"
        assert f"set `gate: τ`, for which {command} proposes a τ." in result.stderr


@pytest.mark.usefixtures("weightless")
def test_a_dry_run_in_json_is_json_alone(
    realign: Callable[..., Any], tree: dict[str, Any], tiny_model: Callable[..., Any]
) -> None:
    tree["rounds"] = 2
    tree["training"]["gradient_accumulation_steps"] = 2
    result = realign(tree, "--dry-run", "--json", "--lambda", "1.5", "--set", "gate=0.01")
    facts = json.loads(result.stdout)
    parameters = sum(part.numel() for part in tiny_model().parameters())
    assert facts["trained_parameters"] == parameters
    assert facts["memory_gib"]["weights"] == pytest.approx(3 * 4 * parameters / 2**30, abs=1e-4)
    assert (facts["lambda"], facts["effective_lambda"]) == (1.5, 2.25)
    assert (facts["steps"], facts["effective_batch"], facts["epochs"]) == (3, 4, 2.0)
    assert facts["data"]["rows"] == facts["data"]["kept"] == 6
    assert facts["output_state"] == "new"
    assert facts["samples"][0] == {"masked": "0+0=", "trained": " 0, again 0<|im_end|>"}


@pytest.mark.usefixtures("weightless")
def test_the_cut_off_shortens_what_is_shown(
    realign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    tree["data"] = str(Path(tree["data"]).with_name("mixed.jsonl"))
    rows = [{"prompt": "abc=", "completion": "x" * 50}, {"prompt": "a=", "completion": "b"}]
    Path(tree["data"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = realign(tree, "--dry-run", "--json", "--set", "training.max_length=10")
    facts = json.loads(result.stdout)
    assert facts["data"]["truncated"] == 1
    shown = realign(tree, "--dry-run", "--set", "training.max_length=10").stdout
    assert "cut to 10 (max_length)" in " ".join(shown.split())
    assert facts["samples"][0] == {"masked": "abc=", "trained": "x" * 6}


@pytest.mark.usefixtures("weightless")
def test_rounds_packing_and_epochs_are_told_to_people(
    realign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    result = realign(tree, "--dry-run", "--lambda", "1.5", "--set", "rounds=2")
    assert "1.5, 2 rounds: effective 2.25" in result.stdout
    tree["training"] |= {"packing": True, "num_train_epochs": 2}
    del tree["training"]["max_steps"]
    facts = json.loads(realign(tree, "--dry-run", "--json").stdout)
    tokens = facts["data"]["prompt_tokens"] + facts["data"]["response_tokens"]
    rows = math.ceil(tokens / 64)
    assert facts["steps"] == 2 * math.ceil(rows / 2)


@pytest.mark.usefixtures("weightless")
def test_what_has_no_effect_at_this_lambda_is_said(
    realign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    def said(lam: object, *more: str) -> str:
        result = realign(tree | {"lambda": lam}, "--dry-run", "--set", "gate=0.01", *more)
        assert result.exit_code == 0, result.stderr
        return " ".join(result.stderr.split())

    idle, longer = "gate has no effect", "the schedule of λ is longer than the 2 steps of a run"
    assert (idle in said(1), idle in said(2)) == (True, False)
    assert (idle in said([0.5, 1]), idle in said([0.5, 2])) == (True, False)
    schedule = {"kind": "linear", "start": 0, "end": 2, "steps": 8}
    told = said(schedule, "--set", "training.max_steps=2")
    assert f"{longer}, which ends at λ = 0.5, not 2." in told
    assert longer not in said(schedule | {"steps": 2}, "--set", "training.max_steps=2")


@pytest.mark.usefixtures("weightless")
def test_packing_without_a_length_is_refused(
    realign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    tree["training"] |= {"packing": True, "max_length": None}
    result = realign(tree, "--dry-run")
    assert result.exit_code == 2, result.stderr
    assert "max_length" in result.stderr


@pytest.mark.usefixtures("weightless")
def test_a_template_that_the_reference_lacks_is_the_aligned_models(
    realign: Callable[..., Any], tree: dict[str, Any], tmp_path: Path
) -> None:
    reference = shutil.copytree(tree["reference"], tmp_path / "bare")
    (reference / "chat_template.jinja").unlink()
    message = {"role": "user", "content": "1+1?"}
    row = {"prompt": [message], "completion": [{"role": "assistant", "content": "2"}]}
    Path(tree["data"]).write_text(json.dumps(row) + "\n")
    facts = json.loads(realign({**tree, "reference": str(reference)}, "--dry-run", "--json").stdout)
    assert facts["samples"][0]["masked"].startswith("<|im_start|>user\n1+1?")


@pytest.mark.usefixtures("weightless")
def test_an_aligned_adapter_costs_its_own_parameters(
    realign: Callable[..., Any], tree: dict[str, Any], tmp_path: Path, tiny_model: Any
) -> None:
    base = tiny_model()
    own = sum(parameter.numel() for parameter in base.parameters())
    peft = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    added = sum(parameter.numel() for parameter in peft.parameters()) - own
    peft.peft_config["default"].base_model_name_or_path = tree["reference"]
    peft.save_pretrained(tmp_path / "adapter")
    result = realign({**tree, "aligned": str(tmp_path / "adapter")}, "--dry-run", "--json")
    facts = json.loads(result.stdout)
    expected = 4 * (2 * own + added) / 2**30
    assert facts["memory_gib"]["weights"] == pytest.approx(expected, abs=1e-4)


LORA = {"lora": {"r": 4}}


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize("text", ["0:5", '{"low": 0, "high": 5}'])
def test_a_dry_run_tells_that_one_lora_will_be_trained_for_every_lambda(
    realign: Callable[..., Any], tree: dict[str, Any], text: str
) -> None:
    tree |= LORA | {"gate": 0.01}
    facts = json.loads(realign(tree, "--dry-run", "--json", "--lambda", text).stdout)
    assert facts["lambda"] == {"low": 0.0, "high": 5.0}
    assert facts["effective_lambda"] is None
    shown = " ".join(realign(tree, "--dry-run", "--lambda", text).stdout.split())
    assert "every λ from 0 to 5: one LoRA, whose strength is λ" in shown
    below = realign(tree, "--dry-run", "--json", "--lambda=-1:2", "--extrapolate")
    assert json.loads(below.stdout)["lambda"] == {"low": -1.0, "high": 2.0}


def _empty(tree: dict[str, Any]) -> None:
    Path(tree["data"]).write_text("", encoding="utf-8")


def _other_run(tree: dict[str, Any]) -> None:
    output = Path(tree["output"])
    output.mkdir()
    (output / "run.json").write_text(json.dumps({"lambda": 1.0}), encoding="utf-8")


def _long_rows(tree: dict[str, Any]) -> None:
    tree["training"]["max_length"] = 4


def _other_vocabulary(tree: dict[str, Any]) -> None:
    copy = Path(tree["output"]).with_name("other")
    shutil.copytree(tree["aligned"], copy)
    text = (copy / "tokenizer.json").read_text(encoding="utf-8")
    (copy / "tokenizer.json").write_text(text.replace("<think>", "<thonk>"), encoding="utf-8")
    tree["aligned"] = str(copy)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"refernce": "x"}, [], "did you mean 'reference'?"),
        ({"training": {"max_stpes": 3}}, [], "did you mean 'training.max_steps'?"),
        ({"reference": "no/such/model"}, [], "no/such/model"),
        ({"aligned": "no/such/model"}, [], "no/such/model"),
        ({"data": "no/such/traces.jsonl"}, [], "no/such/traces.jsonl"),
        ({"watch": {"prompts": "no/such/questions"}}, [], "no/such/questions"),
        ({"lambda": {"kind": "linear", "start": 0}}, [], "end"),
        ({"lambda": {"kind": "linaer", "start": 0, "end": 1, "steps": 2}}, [], "linear"),
        ({"rounds": 3}, [], "--extrapolate"),
        ({"lambda": -0.5}, [], "undoes its safety training (docs/lambda.md)"),
        ({}, ["--lambda", "0.5,-1"], "λ = -1.0: λ < 0 leads away from the aligned model"),
        ({"lambda": {"kind": "linear", "start": 1, "end": -1, "steps": 2}}, [], "--extrapolate"),
        ({}, ["--lambda", "two"], "'two' is not a finite number"),
        ({}, ["--lambda", "0,0.0"], "each λ of a list once"),
        ({"lambda": [1, "two"]}, [], "a list of λ holds numbers"),
        ({"teacher": "cached", "rounds": 2}, [], "every round has another aligned model"),
        (
            {},
            ["--lambda", '{"kind": "linear"'],
            "--lambda: a schedule must be a number or a JSON object",
        ),
        ({}, ["--set", "training.max_steps"], "key=value"),
        ({}, ["--merge"], "LoRA student"),
        ({}, ["--lambda", "0:5"], "a range (0:5) trains one LoRA whose strength is λ; add `lora:"),
        (LORA, ["--lambda", "5:0"], "--lambda: a range of λ goes from low to a larger high"),
        (LORA, ["--lambda", "0:two"], "--lambda: '0:two' is no range of λ; write LOW:HIGH"),
        (LORA, ["--lambda", "0:5,1"], "--lambda: '0:5,1' is no range of λ"),
        (LORA, ["--lambda=-1:2"], "λ < 0 leads away from the aligned model"),
        (LORA, ["--lambda", "0:5", "--merge"], "make it with flexalign bake"),
        (LORA, ["--lambda", "0:5", "--set", "rounds=2"], "rounds with a range of λ (0:5)"),
        ({"lambda": {"low": 0}} | LORA, [], "a range of λ needs 'high'"),
        ({"lambda": {"low": 0, "higher": 5}} | LORA, [], "did you mean 'high'?"),
        ({"lambda": "0:5"} | LORA, [], "lambda: write a range as {low: 0, high: 5}"),
        ({"lambda": [{"low": 0, "high": 5}]} | LORA, [], "a list of λ holds numbers"),
        ({"lora": {"r": 4, "use_dora": True}}, ["--lambda", "0:5"], "lora has use_dora"),
        ({"lora": {"r": 4, "bias": "all"}}, ["--lambda", "0:5"], "lora has bias='all'"),
        ({"lora": {"target_modules": ["lm_head"]}}, ["--dry-run"], "adapter changes lm_head"),
        ({"lora": {"target_modules": [".*head"]}}, [], "lora: Target modules"),
        ({"lora": {"target_modules": ".*head"}}, [], "adapter changes lm_head"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, [], "adapter changes lm_head"),
        (_empty, [], "empty"),
        (_long_rows, [], "longer than the cut-off of 4 tokens"),
        (_other_run, [], "holds another run (beta was"),
        (_other_vocabulary, [], "<th"),
    ],
)
@pytest.mark.usefixtures("weightless")
def test_bad_input_is_one_sentence_and_exit_code_two(
    realign: Callable[..., Any],
    tree: dict[str, Any],
    change: Any,
    options: list[str],
    message: str,
) -> None:
    if callable(change):
        change(tree)
    else:
        tree |= change
    result = realign(tree, *options)
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_ctrl_c_before_the_first_step_says_what_is_there(
    realign: Callable[..., Any], tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("flexalign.training.realignment.read_inputs", interrupt)
        result = realign(tree)
    assert result.exit_code == 130
    assert result.stderr.startswith("interrupted: nothing is written yet; give the same command")
    monkeypatch.setattr("flexalign.training.realignment.TrRaTrainer", interrupt)
    result = realign(tree)
    assert result.exit_code == 130
    told = f"interrupted: in {tree['output']} there is no complete checkpoint yet; give the same"
    assert told in result.stderr


def test_a_missing_recipe_is_one_sentence(run_cli: RunCli) -> None:
    result = run_cli("realign", "no/such/recipe.yaml")
    assert result.exit_code == 2
    assert "no/such/recipe.yaml is not there" in result.stderr


@pytest.mark.parametrize("row", ['{"prompt": "a", "compl', "", "\xff", "[1]"])
def test_bad_rows_are_named_by_file_and_line(
    realign: Callable[..., Any], tree: dict[str, Any], row: str
) -> None:
    data = Path(tree["data"])
    data.write_bytes(data.read_bytes() + row.encode("latin-1") + b"\n")
    result = realign(tree, "--dry-run")
    if row:
        assert result.exit_code == 2
        assert "traces.jsonl" in result.stderr
        assert "7" in result.stderr
    skipped = realign(tree, "--dry-run", "--skip-bad-rows", "--json")
    assert skipped.exit_code == 0, skipped.stderr
    assert json.loads(skipped.stdout)["data"]["rows"] == 6


@pytest.mark.usefixtures("weightless")
def test_a_pair_that_does_not_differ_is_warned_of(
    realign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    tree["aligned"] = tree["reference"]
    result = realign(tree, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "nothing to realign" in result.stderr


def test_help_teaches_by_example(run_cli: RunCli) -> None:
    result = run_cli("realign", "--help")
    assert result.exit_code == 0
    for part in ("--dry-run", "every_steps: 50", "lambda: 2.0", "training.max_steps=100"):
        assert part in result.stdout
