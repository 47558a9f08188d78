"""The demo, short: every row is there, measured and beside its closed form."""

import json

import pytest

from flexalign.miniature import ALIGNED, REFERENCE
from flexalign.miniature.closed_form import expected_outcome, token_level


@pytest.mark.slow
def test_the_demo_trains_measures_and_draws(run_cli, tmp_path):
    output = tmp_path / "demo"
    result = run_cli("demo", "-o", output, "--questions", 40, "--steps", 8, "--json")
    assert result.exit_code == 0, result.stderr
    assert "reference: answers\n" in result.stderr
    assert result.stderr.count(": trains\n") == 2
    assert "one LoRA: trains\n" in result.stderr
    assert "λ=2, 2 rounds: trains\n" in result.stderr
    printed = json.loads(result.stdout)
    rows, dial = printed["rows"], printed["dial"]
    assert [row["name"] for row in rows] == [
        "reference",
        "aligned",
        "λ=0.5",
        "λ=1",
        "λ=2",
        "λ=3",
        "λ=5",
        "λ=2, 2 rounds",
    ]
    stored = json.loads((output / "demo.json").read_text(encoding="utf-8"))
    assert (stored["rows"], stored["dial"]) == (rows, dial)
    assert (output / "pareto.png").read_bytes().startswith(b"\x89PNG")
    for row, lam in zip(rows, (0, 1, 0.5, 1, 2, 3, 5, 4), strict=True):
        expected = expected_outcome(token_level(REFERENCE, ALIGNED, lam, gate=0.01))
        assert row["expected"]["tokens"] == pytest.approx(expected.tokens)
    reference, aligned, *_, twice = rows
    assert reference["tokens"] > aligned["tokens"]
    assert reference["tokens"] > twice["tokens"]
    assert abs(reference["habits"]["again"] - REFERENCE.again) < 0.1
    assert abs(aligned["habits"]["again"] - ALIGNED.again) < 0.1
    slow, mixed, fast, chosen, coin = (row["tokens"][1] for row in dial)
    assert slow == reference["tokens"]
    assert fast < 5 < mixed
    assert fast < chosen < slow
    assert fast <= coin <= slow
    assert dial[0]["over_coin"] == dial[2]["over_coin"] == [0, 0, 0]


def test_a_file_in_the_place_of_the_output_folder_is_refused(run_cli, tmp_path):
    output = tmp_path / "demo"
    output.write_text("mine", encoding="utf-8")
    result = run_cli("demo", "-o", output)
    assert result.exit_code == 2
    assert "name a folder" in result.stderr
