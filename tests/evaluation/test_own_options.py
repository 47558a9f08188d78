"""One model under several prompts and limits, side by side in a sweep, each under its name."""

import json
from pathlib import Path
from typing import Any

import pytest

from flexalign.data.logits import LogitsSettings
from flexalign.data.prompting import PromptSettings
from flexalign.errors import ConfigError, DataError
from flexalign.evaluation import load_task
from flexalign.evaluation.sweep import evaluate, plan_sweep
from flexalign.miniature import SYSTEM
from flexalign.models.prompted import PromptPair
from flexalign.systems import System, SystemOptions, parse_systems

HYBRID = "miniature:hybrid"


def responses(folder: Path, system: str, setting: str = "as it is") -> list[str]:
    with (folder / "samples.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    found = {r["question"]: r for r in rows if (r["system"], r["setting"]) == (system, setting)}
    return [found[question]["response"] for question in sorted(found)]


def test_rivals_of_one_model_answer_as_each_would_alone(tmp_path: Path) -> None:
    task = load_task("miniature", limit=4)
    rivals = parse_systems(
        [f"{name}=model:{HYBRID}" for name in ("plain", "brief", "cut", "both")],
        [
            f"brief:system={SYSTEM}",
            "cut:thinking_budget=14",
            f"both:system={SYSTEM}",
            "both:end_of_thinking_bias=80",
        ],
    )
    options: dict[str, Any] = {"samples": 1, "max_new_tokens": 80}
    summary = evaluate(rivals, [task], tmp_path / "rivals", baseline="plain", **options).summary
    assert summary is not None
    assert [row.system for row in summary.rows] == ["plain", "brief", "cut", "both"]

    # The two prompts of a pair are the same two prompts, by another way.
    prompts = PromptPair(PromptSettings(), PromptSettings(system=SYSTEM))
    evaluate(
        [f"pair=prompts:{HYBRID}"], [task], tmp_path / "pair", settings=[0, 1], prompts=prompts,
        **options,
    )  # fmt: skip
    assert responses(tmp_path / "rivals", "plain") == responses(tmp_path / "pair", "pair", "λ=0")
    assert responses(tmp_path / "rivals", "brief") == responses(tmp_path / "pair", "pair", "λ=1")
    assert responses(tmp_path / "rivals", "plain") != responses(tmp_path / "rivals", "brief")

    # A limit of all systems is that of the one.
    evaluate(
        [f"all=model:{HYBRID}"], [task], tmp_path / "all", thinking_budget=14, **options
    )  # fmt: skip
    assert responses(tmp_path / "rivals", "cut") == responses(tmp_path / "all", "all")
    for response in responses(tmp_path / "rivals", "both"):
        assert response.split()[1] == "</think>"

    told = json.loads((tmp_path / "rivals" / "run.json").read_text(encoding="utf-8"))
    text = json.dumps(told, ensure_ascii=False)
    assert '"own": {"thinking_budget": 14}' in text
    assert SYSTEM in text
    with pytest.raises(ConfigError, match="own"):
        evaluate(
            parse_systems([one.name + f"=model:{HYBRID}" for one in rivals]),
            [task], tmp_path / "rivals", baseline="plain", **options,
        )  # fmt: skip


def test_template_arguments_are_one_systems_own(hybrid_folder: Path) -> None:
    systems = parse_systems(
        [f"slow=model:{hybrid_folder}", f"fast=model:{hybrid_folder}"],
        ["fast:enable_thinking=false", "fast:system=the answer is six."],
    )
    sweep = plan_sweep(systems, [load_task("miniature", limit=1)], samples=1)
    shown = {name: text for name, _, text in sweep.previews()}
    assert shown["slow"].endswith("<think>\n")
    assert shown["fast"].endswith("<think>\n\n</think>\n\n")
    assert "the answer is six." in shown["fast"]
    assert "the answer is six." not in shown["slow"]
    for system in systems:
        shown_here = {sweep.backends[system.name].render(c.messages) for c in sweep.cells(system)}
        assert shown_here == {shown[system.name]}


def test_the_command_line_takes_them(run_cli: Any) -> None:
    result = run_cli(
        "evaluate", "a=model:miniature", f"b=model:{HYBRID}", "--task", "miniature", "--limit", 1,
        "--samples", 1, "--for", f"b:system={SYSTEM}", "--for", "b:thinking_budget=9", "--dry-run",
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert [SYSTEM in one["prompt"] for one in told["prompts"]] == [False, True]
    owns = [system.get("own") for system in told["configuration"]["systems"]]
    assert owns == [None, {"system": SYSTEM, "thinking_budget": 9}]


@pytest.mark.parametrize(
    ("own", "problem"),
    [
        ("thinking_budget=9", "write NAME:KEY=VALUE"),
        ("brief:thinking_budget", "write NAME:KEY=VALUE"),
        ("breif:system=x", "did you mean 'brief'"),
        ("plain:thinking_budget=3", "with a system's name; known are brief."),
        ("brief", "KEY=VALUE is missing; write NAME:KEY=VALUE, such as brief:thinking_budget="),
        ("brief:thinking_budget", "'brief:thinking_budget': KEY=VALUE is missing"),
        ("brief:thinking_budget=-1", "--for brief: thinking_budget must be"),
        ("brief:end_of_thinking_bias=much", "--for brief: end_of_thinking_bias must be"),
        ("brief:system=", "--for brief: system= is empty"),
    ],
)
def test_a_malformed_option_is_refused(own: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_systems(["brief=model:miniature"], [own])


def test_what_an_engine_or_a_kind_does_not_serve_is_refused(hybrid_folder: Path) -> None:
    task = load_task("miniature", limit=1)

    def plan(name: str, own: str, **options: Any) -> Any:
        return plan_sweep(parse_systems([f"x={name}"], [f"x:{own}"]), [task], **options)

    with pytest.raises(ConfigError, match="by --for, is for what the local engine renders"):
        plan("url:http://127.0.0.1:1", "enable_thinking=false")
    with pytest.raises(ConfigError, match="a server cannot apply this"):
        plan("url:http://127.0.0.1:1", "thinking_budget=3")
    prompts = PromptPair(PromptSettings(), PromptSettings(system=SYSTEM))
    with pytest.raises(ConfigError, match="would stand in both prompts"):
        plan(f"prompts:{HYBRID}", "system=x", prompts=prompts)
    with pytest.raises(ConfigError, match="no_such_name"):
        plan(f"model:{hybrid_folder}", "no_such_name=1")


def test_a_question_with_another_system_message_is_refused() -> None:
    system = System("x", "model", ("miniature",), PromptSettings(system="one"))
    messages = [{"role": "system", "content": "two"}, {"role": "user", "content": "3+14?"}]
    with pytest.raises(DataError, match="system message of its own"):
        system.prompt.with_system({"prompt": messages}, 1)


def test_the_longest_name_owns_an_option() -> None:
    a, b = parse_systems(["model:a", "x=model:b"], ["model:a:thinking_budget=3"])
    with pytest.raises(ConfigError, match=r"did you mean 'model:long'\?"):
        parse_systems(["model:long", "x=model:b"], ["model:lung:system=y: z"])
    assert (a.own, b.own) == ({"thinking_budget": 3}, {})
    shared = SystemOptions(logits=LogitsSettings(top_k=5))
    assert a.options(shared).logits == LogitsSettings(top_k=5, thinking_budget=3)
    assert b.options(shared) == shared


def test_an_option_that_systems_do_not_have_is_refused_by_the_nearest(tmp_path: Path) -> None:
    task = load_task("miniature", limit=2)
    with pytest.raises(ConfigError, match=r"no option 'max_tokens'; did you mean 'max_new_tokens'"):
        evaluate(["model:miniature"], [task], tmp_path / "out", max_tokens=80)
    assert not (tmp_path / "out").exists()
