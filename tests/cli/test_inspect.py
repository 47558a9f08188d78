"""``flexalign inspect`` by its exit codes, its JSON and what a person reads."""

import json
import shutil
import subprocess
import sys

import pytest

from flexalign.miniature import folder as miniature
from flexalign.models.loading import fingerprint

TRACES = [
    {"prompt": [{"role": "user", "content": "1+2"}], "completion": [{"role": "assistant", "content": text}]}
    for text in ("three", "the answer is three", "1+2=3 again 1+2=3")
]  # fmt: skip


@pytest.fixture
def traces(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TRACES))
    return path


@pytest.fixture
def unfit(tiny_pair, tmp_path):
    """The aligned model with two tokens exchanged."""
    folder = shutil.copytree(tiny_pair.aligned, tmp_path / "unfit")
    state = json.loads((folder / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


def test_one_model(tiny_pair, run_cli):
    result = run_cli("inspect", tiny_pair.reference, "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 0
    assert facts["family"] == "qwen2"
    assert facts["fingerprint"] == fingerprint(tiny_pair.reference)
    assert facts["thinking_tags"] == ["<think>", "</think>"]
    shown = run_cli("inspect", tiny_pair.reference)
    assert shown.exit_code == 0
    assert facts["fingerprint"] in shown.stdout


WITHOUT_TORCH = """
import json, sys
from flexalign.cli.app import main

sys.argv[1:] = json.loads(sys.argv[1])
try:
    main()
except SystemExit as left:
    assert not left.code, left.code
print("loaded" if sys.modules.get("torch") else "left out", file=sys.stderr)
"""


@pytest.mark.parametrize(("parts", "is_left_out"), [((0,), True), ((0, 1), True), ((0, 0), False)])
def test_plain_folders_are_read_without_torch(parts, is_left_out, tiny_pair, run_cli):
    """With equal tensors to compare, torch is loaded; what is said is the same."""
    arguments = ["inspect", *(str(tiny_pair[part]) for part in parts), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ("left out\n" if is_left_out else "loaded\n")
    assert json.loads(done.stdout) == json.loads(run_cli(*arguments).stdout)


def test_a_pair_that_fits(tiny_pair, run_cli):
    result = run_cli("inspect", *tiny_pair, "--json")
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["fits"], facts["problems"]) == (0, True, [])
    assert facts["vocab_size"] == 320
    assert facts["gib"] == facts["reference"]["gib"] + facts["aligned"]["gib"]
    assert facts["aligned"]["fingerprint"] == fingerprint(tiny_pair.aligned)
    shown = run_cli("inspect", *tiny_pair)
    assert (shown.exit_code, "fits: 320 shared tokens" in shown.stdout) == (0, True)


def test_a_pair_that_does_not_fit_is_exit_code_2(tiny_pair, unfit, run_cli, traces):
    for options in ([], ["--diff", traces]):
        result = run_cli("inspect", tiny_pair.reference, unfit, "--json", *options)
        facts = json.loads(result.stdout)
        assert (result.exit_code, facts["fits"], facts["vocab_size"]) == (2, False, None)
        assert "'a' is " in facts["problems"][0]
        assert "difference" not in facts
    shown = run_cli("inspect", tiny_pair.reference, unfit)
    assert shown.exit_code == 2
    assert "does not fit: the tokenizers differ: 'a' is " in shown.stdout


def test_equal_models_are_said(tiny_pair, run_cli):
    result = run_cli("inspect", tiny_pair.reference, tiny_pair.reference, "--json")
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["identical"]) == (0, True)
    assert "nothing to realign" in facts["warnings"][0]
    shown = run_cli("inspect", tiny_pair.reference, tiny_pair.reference)
    assert "warning: " in shown.stdout
    assert "nothing to realign" in shown.stdout


@pytest.mark.parametrize(
    ("names", "kind", "held"),
    [
        (["miniature:dial"], "LoRA dial", {"gate": 0.01, "lambda_range": [0.0, 5.0]}),
        (["miniature:reference", "DIAL"], "LoRA dial", {"gate": 0.01, "default_lambda": 1.0}),
        (["miniature:fast"], "InRa adapter", {"adapter_layers": 1, "lambda_range": [0.0, 1.0]}),
        (["miniature", "miniature:fast"], "InRa adapter", {"default_lambda": 0.0}),
    ],
)
def test_a_trained_dial_is_shown_as_its_folder_has_it(names, kind, held, run_cli, tmp_path):
    names = [
        shutil.copytree(miniature("dial"), tmp_path / "own") if n == "DIAL" else n for n in names
    ]
    result = run_cli("inspect", *names, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    dial = facts["dial"]
    assert (dial["kind"], dial["base"]) == (kind, "miniature:reference")
    assert dial["base_fingerprint"] == fingerprint("miniature:reference")
    assert dial["calibration"] is None
    assert held.items() <= dial.items()
    if names != ["miniature:fast"]:  # an InRa adapter alone is no model
        assert facts.get("reference", facts)["family"] == "llama"

    shown = " ".join(run_cli("inspect", *names).stdout.split())
    low, high = dial["lambda_range"]
    for part in (
        f"kind │ {kind}",
        f"λ permitted │ {low:g} to {high:g}",
        f"default λ │ {dial['default_lambda']:g}",
        "gate of training │ 0.01" if kind == "LoRA dial" else "place │ 1 layer before the base's",
        "calibration │ none",
    ):
        assert part in shown


def test_a_dials_calibration_is_shown(run_cli, tmp_path):
    folder = shutil.copytree(miniature("fast"), tmp_path / "own")
    file = folder / "inra_config.json"
    effort = {"lambdas": [[0.0, 1.0], [100.0, 0.0], [125.0, -0.5]]}
    given = {"version": 1, "effort": effort, "lambda_range": [-0.5, 1.0]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"calibration": given}))
    shown = " ".join(run_cli("inspect", folder).stdout.split())
    assert "efforts 0 to 125, λ from -0.5 to 1" in shown
    assert json.loads(run_cli("inspect", folder, "--json").stdout)["dial"]["calibration"] == given


def test_an_adapter_of_another_base_does_not_fit(run_cli):
    result = run_cli("inspect", "miniature:aligned", "miniature:fast")
    assert result.exit_code == 2
    assert "miniature:fast was made for miniature:reference" in result.stderr
    assert "--any-base" not in result.stderr


def test_a_padded_width_is_noted(tiny_pair, tiny_model, tiny_tokenizer, run_cli, tmp_path):
    for part in (tiny_model(vocab_size=384, seed=1), tiny_tokenizer):
        part.save_pretrained(tmp_path / "wide")
    shown = run_cli("inspect", tiny_pair.reference, tmp_path / "wide")
    assert shown.exit_code == 0, shown.stdout
    assert "note: logits are 320 wide in the reference and 384 in the aligned model" in shown.stdout


def test_the_miniature_is_compared_with_its_own_aligned_model(run_cli, tmp_path):
    questions = tmp_path / "traces.jsonl"
    assert run_cli("miniature", "traces", "--count", "2", "-o", questions).exit_code == 0
    result = run_cli("inspect", "miniature", "--diff", questions, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["aligned"]["name"] == "miniature:aligned"
    assert facts["difference"]["rows"] == 2


def test_what_is_not_decided_names_the_responses_that_are_not_read(run_cli, tmp_path):
    traces = tmp_path / "traces.jsonl"
    assert run_cli("miniature", "traces", "--count", "12", "-o", traces).exit_code == 0
    pair = ("miniature:reference", "miniature:concise")
    shown = run_cli("inspect", *pair, "--diff", traces, "--limit", 8)
    assert shown.exit_code == 0, shown.stderr
    told = "is not decided on 8 of 12 responses; more decide it: --limit 12."
    assert told in shown.stdout


@pytest.mark.parametrize("aligned", ["miniature:concise", "miniature:fast"])
def test_whether_thinking_deeper_pays_is_said_before_anything_is_sampled(
    aligned, run_cli, tmp_path
):
    traces = tmp_path / "traces.jsonl"
    assert run_cli("miniature", "traces", "--count", "30", "-o", traces).exit_code == 0
    rows = [json.loads(line) for line in traces.read_text().splitlines()]
    result = run_cli("inspect", "miniature:reference", aligned, "--diff", traces, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["difference"]["deeper"]
    assert found["lambda"] == -0.25
    assert found["tokens"] == pytest.approx(
        sum(len(row["completion"][0]["content"].split()) + 1 for row in rows) / len(rows)
    )
    for part in ("whole", "length", "rest"):
        low, high = found[part]["accuracy_ci"]
        assert low <= found[part]["accuracy"] <= high
    together = found["length"]["accuracy"] + found["rest"]["accuracy"]
    assert found["whole"]["accuracy"] == pytest.approx(together, abs=1e-9)
    if aligned == "miniature:fast":  # its stream does not think, so that nothing can be told
        assert found["variation"] > 0.5
        assert found["verdict"] == "not decided"
    shown = run_cli("inspect", "miniature:reference", aligned, "--diff", traces)
    assert found["sentence"] in shown.stdout

    # Without known answers there is no accuracy, and so no verdict.
    for row in rows:
        del row["answer"]
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows))
    blind = run_cli("inspect", "miniature:reference", aligned, "--diff", traces, "--json")
    found = json.loads(blind.stdout)["difference"]["deeper"]
    assert (found["whole"]["accuracy"], found["verdict"]) == (None, "not decided")


def test_what_is_loaded_for_a_difference_is_named(tiny_pair, run_cli, traces):
    result = run_cli("inspect", *tiny_pair, "--diff", traces)
    loaded = [line for line in result.stderr.splitlines() if line.startswith("loading ")]
    assert [line.partition(",")[0] for line in loaded] == [f"loading {part}" for part in tiny_pair]
    assert "reading with both models" in result.stderr


def test_the_difference_on_traces(tiny_pair, run_cli, traces):
    result = run_cli("inspect", *tiny_pair, "--diff", traces, "--json")
    assert result.exit_code == 0
    difference = json.loads(result.stdout)["difference"]
    assert difference["rows"] == 3
    assert difference["falls"][0].keys() == {"token", "reference", "aligned", "log_change"}
    fewer = run_cli("inspect", *tiny_pair, "--diff", traces, "--limit", "1", "--json")
    assert json.loads(fewer.stdout)["difference"]["tokens"] < difference["tokens"]
    assert (json.loads(fewer.stdout)["difference"]["available"], difference["available"]) == (3, 3)
    part = run_cli("inspect", *tiny_pair, "--diff", traces, "--limit", "1")
    assert "\n1 of 3 responses, " in part.stdout
    shown = run_cli("inspect", *tiny_pair, "--diff", traces)
    assert "\n3 responses, " in shown.stdout
    assert f"{difference['tokens']:,} tokens" in shown.stdout
    assert f"τ = {difference['gate']:.2g}" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere/model"], "no model 'nowhere/model'"),
        (["{model}", "--diff", "x.jsonl"], "name the aligned one"),
        (["{model}", "{model}", "--dtype", "int3"], "float32"),
        (["{model}", "{other}", "--limit", "8"], "--limit has no meaning without --diff"),
        (["{model}", "{other}", "--batch-size", "8"], "--batch-size has no meaning without --diff"),
        (["{model}", "{other}", "--diff", "x.jsonl"], "x.jsonl"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(arguments, words, tiny_pair, run_cli):
    places = {"model": tiny_pair.reference, "other": tiny_pair.aligned}
    result = run_cli("inspect", *(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
