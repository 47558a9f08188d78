"""The model for lm-evaluation-harness, held against the harness's own ``hf`` on offline tasks.

λ = 0 must give what ``hf`` gives on the base, λ = 1 what it gives on the model that really has
the adapter as its layer 0.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; make test-full does so")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from conftest import TinyPair
from contract.subjects import inserted, put_lora, stir
from flexalign.errors import CheckpointError, ConfigError, LambdaError, PairMismatchError
from flexalign.evaluation.harness import HarnessModel
from flexalign.generation import TwoModelDecoder
from flexalign.inra import InRaModel
from flexalign.lora_dial import LoRADial, LoRADialConfig
from flexalign.miniature import folder as miniature_folder
from flexalign.models.loading import load_tokenizer
from flexalign.models.pair import ModelPair
from twin import fuse64

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("default")]

CHOICES = """\
task: offline_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}="
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
RESPONSES = """\
task: offline_responses
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}="
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "7"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TEXTS = """\
task: offline_texts
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}={{answer}}"
metric_list: [{metric: word_perplexity}]
"""
TASKS = {"offline_choices": CHOICES, "offline_responses": RESPONSES, "offline_texts": TEXTS}
SUMS = [(12, 34), (5, 51), (7, 8), (90, 3), (1, 2), (46, 5), (33, 44), (60, 21)]


class Dial(NamedTuple):
    """A base, an adapter, and the plain models that are the two ends, as names or folders."""

    base: str
    adapter: str
    ends: tuple[str, str]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"{a}+{b}",
            "answer": str(a + b),
            "choices": [str(a + b + 10), str(a + b), f"{a}{b}"],
            "label": 1,
        }
        for a, b in SUMS
    ]
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Dial:
    folder = tmp_path_factory.mktemp("tiny")
    base = tiny_model(initializer_range=0.1)
    model = InRaModel.create(base)
    stir(model.adapter, 0.2, seed=2)
    return _save(folder, base, model, tiny_tokenizer)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Dial:
    model = InRaModel.from_pretrained("miniature", "miniature:fast", dtype="float32")
    folder = tmp_path_factory.mktemp("miniature")
    made = _save(folder, model.base, model, load_tokenizer("miniature"))
    return Dial("miniature", "miniature:fast", made.ends)


def _save(folder: Path, base: PreTrainedModel, model: InRaModel, tokenizer: Any) -> Dial:
    ends = {"base": base, "inserted": inserted(base, model.adapter[0])}
    for name, end in ends.items():
        end.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model.save_pretrained(folder / "adapter")
    return Dial(*(str(folder / name) for name in ("base", "adapter")), tuple(_paths(folder, ends)))


def _paths(folder: Path, names: Any) -> list[str]:
    return [str(folder / name) for name in names]


def measure(
    tasks: TaskManager,
    model: str,
    names: list[str] | None = None,
    asked: dict[str, Any] | None = None,
    **arguments: Any,
):
    """Every request's outcome and the metrics, task by task."""
    results = lm_eval.simple_evaluate(
        model=model,
        model_args={"dtype": "float32", **arguments},
        tasks=names or list(TASKS),
        task_manager=tasks,
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
        **(asked or {}),
    )
    outcomes = {
        name: [sample["resps"] for sample in sorted(rows, key=lambda row: row["doc_id"])]
        for name, rows in results["samples"].items()
    }
    metrics = {name: _figures(row) for name, row in results["results"].items()}
    return outcomes, metrics


def _figures(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, float)}


@pytest.mark.parametrize("kind", ["tiny", "miniature"])
@pytest.mark.parametrize("end", [0, 1])
def test_both_ends_give_the_numbers_of_hf(
    kind: str, end: int, tasks: TaskManager, request: pytest.FixtureRequest
):
    dial: Dial = request.getfixturevalue(kind)
    ours, metrics = measure(
        tasks, "flexalign", pretrained=dial.base, adapter=dial.adapter, **{"lambda": end}
    )
    theirs, expected = measure(tasks, "hf", pretrained=dial.ends[end])

    assert ours["offline_responses"] == theirs["offline_responses"]
    for name in ("offline_choices", "offline_texts"):
        for found, wanted in zip(ours[name], theirs[name], strict=True):
            assert _numbers(found) == pytest.approx(_numbers(wanted), abs=1e-4)
    assert metrics.keys() == expected.keys()
    for name, row in metrics.items():
        assert row == pytest.approx(expected[name], rel=1e-4)


def test_a_lora_dials_ends_give_the_numbers_of_hf(
    tasks: TaskManager,
    tiny: Dial,
    tmp_path: Path,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
):
    model = put_lora(tiny_model(initializer_range=0.1), 0.2)
    settings = LoRADialConfig("base", "", lambda_range=(0.0, 3.0))
    LoRADial(model, settings).save_pretrained(tmp_path)
    merged = tmp_path / "merged"  # by PEFT; hf's own peft= gives the base more tokens
    model.merge_and_unload().save_pretrained(merged)
    tiny_tokenizer.save_pretrained(merged)
    for end, plain in ((0, tiny.base), (1, str(merged))):
        ours, _ = measure(
            *(tasks, "flexalign"), pretrained=tiny.base, adapter=str(tmp_path), **{"lambda": end}
        )
        theirs, _ = measure(tasks, "hf", pretrained=plain)
        assert ours["offline_responses"] == theirs["offline_responses"]
        for name in ("offline_choices", "offline_texts"):
            for found, wanted in zip(ours[name], theirs[name], strict=True):
                assert _numbers(found) == pytest.approx(_numbers(wanted), abs=1e-3)
    with pytest.raises(LambdaError, match="extrapolate=True"):
        HarnessModel(tiny.base, adapter=str(tmp_path), lam=4)
    with pytest.raises(ConfigError, match="takes no gate"):
        HarnessModel(tiny.base, adapter=str(tmp_path), lam=1, gate=0.1)


def test_the_two_ends_differ(tasks: TaskManager, miniature: Dial):
    # or the comparison above would hold of a model without a dial
    (slow, _), (fast, _) = (
        measure(tasks, "hf", ["offline_responses", "offline_choices"], pretrained=end)
        for end in miniature.ends
    )
    assert slow["offline_responses"] != fast["offline_responses"]
    assert slow["offline_choices"] != fast["offline_choices"]


def test_in_between_is_equation_5(tiny: Dial):
    ours = HarnessModel(tiny.base, adapter=tiny.adapter, lam=0.3, dtype="float32", device="cpu")
    tokens = torch.randint(6, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    ends = [
        HarnessModel(path, dtype="float32", device="cpu")._model_call(tokens).double()
        for path in tiny.ends
    ]
    assert torch.allclose(ours._model_call(tokens).double(), fuse64(*ends, 0.3), atol=1e-5)


def test_a_pair_is_measured_at_its_lambda(tasks: TaskManager, tiny_pair: TinyPair):
    reference, aligned = map(str, tiny_pair)
    for end, path in enumerate((reference, aligned)):
        ours, _ = measure(
            tasks, "flexalign", pretrained=reference, aligned=aligned, **{"lambda": end}
        )
        theirs, _ = measure(tasks, "hf", pretrained=path)
        assert ours["offline_responses"] == theirs["offline_responses"]
        for found, wanted in zip(ours["offline_choices"], theirs["offline_choices"], strict=True):
            assert _numbers(found) == pytest.approx(_numbers(wanted), abs=1e-4)

    decoder = TwoModelDecoder(ModelPair.load(reference, aligned))
    model = HarnessModel(reference, aligned=aligned, lam=2.0, gate=0.05, device="cpu")
    tokens = torch.randint(6, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model._model_call(tokens), decoder(tokens, lam=2.0, gate=0.05).logits)


def test_two_prompts_are_hf_under_each_of_them(tasks: TaskManager, hybrid_folder: Path):
    names = ["offline_responses", "offline_choices"]
    brief = "the answer is six."
    for end, told in enumerate((None, brief)):
        ours, _ = measure(
            tasks,
            "flexalign",
            names,
            {"apply_chat_template": True},
            pretrained=str(hybrid_folder),
            aligned_system=brief,
            **{"lambda": end},
        )
        theirs, _ = measure(
            tasks,
            "hf",
            names,
            {"apply_chat_template": True, "system_instruction": told},
            pretrained=str(hybrid_folder),
        )
        assert ours["offline_responses"] == theirs["offline_responses"]
        for found, wanted in zip(ours["offline_choices"], theirs["offline_choices"], strict=True):
            assert _numbers(found) == pytest.approx(_numbers(wanted), abs=1e-4)


@torch.no_grad()
def test_two_prompts_in_between_are_equation_5(hybrid_folder: Path, hybrid_tokenizer: Any):
    template = "{enable_thinking: false}"
    model = HarnessModel(
        str(hybrid_folder), aligned_template=template, lam=1.7, dtype="float32", device="cpu"
    )
    context = model.apply_chat_template([{"role": "user", "content": "1+2="}])
    assert context.endswith("<think>\n")
    continuations = ["3", " the answer is six"]
    found = model.loglikelihood(
        [Instance("loglikelihood", {}, (context, text), 0) for text in continuations]
    )

    plain = AutoModelForCausalLM.from_pretrained(hybrid_folder)
    prompts = [context, context.removesuffix("\n") + "\n\n</think>\n\n"]
    for text, (likelihood, _) in zip(continuations, found, strict=True):
        ids = hybrid_tokenizer(text, add_special_tokens=False)["input_ids"]
        logits = []
        for prompt in prompts:
            before = hybrid_tokenizer(prompt, add_special_tokens=False)["input_ids"]
            own = plain(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
            logits.append(own.double())
        fused = fuse64(*logits, 1.7).log_softmax(-1)
        expected = float(fused.gather(-1, torch.tensor(ids)[:, None]).sum())
        assert likelihood == pytest.approx(expected, abs=1e-4)


def test_two_prompts_need_conversations(tasks: TaskManager):
    model = {"pretrained": "miniature", "aligned_system": "check"}
    with pytest.raises(ConfigError, match="--apply_chat_template"):
        measure(tasks, "flexalign", ["offline_responses"], **model)
    with pytest.raises(ConfigError, match="alike under both"):
        measure(tasks, "flexalign", ["offline_texts"], {"apply_chat_template": True}, **model)


def test_a_policy_chooses_the_way_of_every_response(tasks: TaskManager, miniature: Dial):
    names = ["offline_responses"]
    dial = {"pretrained": miniature.base, "adapter": miniature.adapter}
    (slow, _), (fast, _) = (
        measure(tasks, "flexalign", names, **dial, **{"lambda": end}) for end in (0, 1)
    )
    never, _ = measure(tasks, "flexalign", names, **dial, policy="adaptive 1")
    mixed, _ = measure(tasks, "flexalign", names, **dial, policy="adaptive 0.5")
    assert never == slow
    ways = list(
        zip(*(outcome["offline_responses"] for outcome in (mixed, fast, slow)), strict=True)
    )
    assert all(one in (quick, thought) for one, quick, thought in ways)
    assert any(one == quick != thought for one, quick, thought in ways)
    assert any(one == thought != quick for one, quick, thought in ways)


@pytest.mark.parametrize("name", ["offline_choices", "offline_texts"])
def test_a_policy_scores_no_given_answers(name: str, tasks: TaskManager, tiny: Dial):
    with pytest.raises(ConfigError, match="log-likelihoods need one λ"):
        measure(
            tasks,
            "flexalign",
            [name],
            pretrained=tiny.base,
            adapter=tiny.adapter,
            policy="adaptive 0.5",
        )


def test_settings_are_recorded(tiny: Dial):
    model = HarnessModel(
        tiny.base, adapter=tiny.adapter, policy='{"policy": "route", "share": 0.3}', device="cpu"
    )
    facts = model.get_model_info()["flexalign"]
    assert facts["dial"] == {"policy": "route", "share": 0.3}
    assert (facts["pretrained"], facts["adapter"]) == (tiny.base, tiny.adapter)
    assert len(facts["fingerprint"]) == 16
    default = HarnessModel(tiny.base, adapter=tiny.adapter, device="cpu")
    assert default.get_model_info()["flexalign"]["dial"]["lambda"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lambda": 1}, ConfigError, "lambda= needs a dial: adapter=… or aligned=…"),
        ({"gate": 0.1}, ConfigError, "gate= needs a dial"),
        ({"adapter": "a", "aligned": "b"}, ConfigError, "adapter= or aligned=, not both"),
        ({"adapter": "a", "lambda": 1, "policy": "auto"}, ConfigError, "one of lambda and policy"),
        ({"adapter": "miniature:fast", "lambda": 2}, LambdaError, "extrapolate=True"),
        ({"aligned": "miniature:aligned", "lambda": -1}, LambdaError, "safety.*extrapolate=True"),
        ({"adapter": "miniature:fast", "policy": "adaptive x"}, ConfigError, "'x' is not a number"),
        ({"adapter": "nowhere"}, CheckpointError, "nowhere holds no dial"),
        # What `hf` takes for models that it loads itself, and what nobody takes.
        ({"adapter": "a", "lamda": 1.0}, ConfigError, "'lamda'; did you mean 'lambda'"),
        (
            {"aligned_systm": "check ;", "lambda": 1.5},
            ConfigError,
            "'aligned_systm'; did you mean 'aligned_system'",
        ),
        ({"adapter": "miniature:dial", "gate": 0.1}, ConfigError, "^gate=: a LoRA dial takes no"),
        ({"adapter": "a", "aligned_system": "b"}, ConfigError, r"leave them out, or adapter=\.$"),
        ({"aligned": "a", "aligned_system": "b"}, ConfigError, r"leave them out, or aligned=\.$"),
        ({"by_id": True, "adapter": "a"}, ConfigError, "^by_id= is about .* aligned=…"),
        ({"load_in_8bit": True}, ConfigError, "no argument 'load_in_8bit'"),
        ({"peft": "some/adapter"}, ConfigError, "peft=some/adapter is not served.*aligned="),
        ({"revision": "abc"}, ConfigError, "revision=abc is not served"),
        ({"backend": "seq2seq"}, ConfigError, "backend=seq2seq is not served"),
        ({"tokenizer": "other"}, ConfigError, "tokenizer=other is not served"),
        ({"adapter": "a", "mixed_precision_dtype": "bfloat16"}, ConfigError, "dtype="),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], error: type, message: str):
    with pytest.raises(error, match=message):
        HarnessModel("miniature", device="cpu", **arguments)


def test_another_base_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "flexalign.systems.local.LocalBackend.load", lambda *_, **__: pytest.fail("loaded")
    )
    with pytest.raises(PairMismatchError, match=r"other weights\. Give its own base\.$"):
        HarnessModel("miniature:aligned", adapter="miniature:fast", device="cpu")
    with pytest.raises(ConfigError, match=r"the aligned prompt has .* context"):
        HarnessModel("miniature:hybrid", aligned_system="check ; " * 600, device="cpu")


def test_what_hf_takes_by_default_is_taken_too():
    model = HarnessModel(
        "miniature", device="cpu", backend="causal", revision="main", peft=None, batch_size=3
    )
    assert (model.backend, model.batch_size) == ("causal", 3)


@pytest.mark.parametrize("add_bos_token", [True, False, None])
def test_bos_is_added_as_hf_adds_it(add_bos_token: bool | None):
    given = {"device": "cpu", "add_bos_token": add_bos_token}
    ours = HarnessModel("miniature", adapter="miniature:fast", lam=0.0, **given)
    hf = HFLM(pretrained=str(miniature_folder("reference")), **given)

    assert ours.tok_encode("1 + 2") == hf.tok_encode("1 + 2")
    mine, theirs = ours.tok_batch_encode(["1 + 2"]), hf.tok_batch_encode(["1 + 2"])
    assert torch.equal(mine[0], theirs[0])
    begins_with_bos = ours.tok_encode("1 + 2")[0] == ours.tokenizer.bos_token_id
    assert begins_with_bos is bool(add_bos_token)


def test_the_cache_of_requests_tells_settings_apart(tiny: Dial, tmp_path: Path):
    request = Instance("loglikelihood", {}, ("12+34=", "46"), 0)

    def measured(lam: float, uses_cache: bool = True) -> tuple[list[Any], int]:
        model = HarnessModel(tiny.base, adapter=tiny.adapter, lam=lam, device="cpu")
        cached = CachingLM(model, str(tmp_path / "cache.db")) if uses_cache else model
        runs, run = [], model._model_call
        model._model_call = lambda *given: (runs.append(given), run(*given))[1]
        return cached.loglikelihood([request]), len(runs)

    for lam in (0.0, 1.0):
        assert measured(lam) == (measured(lam, uses_cache=False)[0], 1)
    assert measured(0.0)[0] != measured(1.0)[0]
    assert [measured(lam)[1] for lam in (0.0, 1.0)] == [0, 0]


@pytest.mark.filterwarnings("ignore:λ = 2 leaves")
def test_a_lambda_outside_the_range_is_permitted_when_meant():
    model = HarnessModel(
        "miniature", adapter="miniature:fast", lam=2, extrapolate=True, device="cpu"
    )
    assert model.get_model_info()["flexalign"]["dial"] == {"policy": "fixed", "lambda": 2.0}


def test_the_command_takes_what_lm_eval_takes(
    tasks: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Dial
):
    folder = Path(str(tasks.include_path))
    command = [
        "harness",
        *("--model", "flexalign", "--tasks", str(folder / "offline_responses.yaml")),
        *("--model_args", f"pretrained={tiny.base},adapter={tiny.adapter},policy=adaptive 0.5"),
        *("--device", "cpu", "--batch_size", "4", "--output_path", str(tmp_path / "out")),
    ]
    monkeypatch.setattr(sys, "argv", command)
    from flexalign.evaluation import harness

    harness.main()
    (written,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(written.read_text())["config"]
    assert config["flexalign"]["dial"] == {"policy": "adaptive", "threshold": 0.5}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("lambda=7", "error: λ=7: outside the range [0, 1] of the adapter miniature:fast; "),
        ("lamda=1", "error: the model has no argument 'lamda'; did you mean 'lambda'?\n"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    tasks: TaskManager,
    more: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    given = f"pretrained=miniature,adapter=miniature:fast,{more}"
    folder = Path(str(tasks.include_path))
    command = ["harness", "--model", "flexalign", "--model_args", given, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--tasks", str(folder / "offline_responses.yaml")])
    from flexalign.evaluation import harness

    with pytest.raises(SystemExit) as refused:
        harness.main()
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert said[said.index("error: ") :].startswith(sentence)
    assert "Traceback" not in said


def _numbers(responses: Any) -> list[float]:
    """Log-likelihoods, and whether they are greedy, of one document's requests."""
    flat: list[float] = []
    for part in responses if isinstance(responses, list | tuple) else [responses]:
        flat += _numbers(part) if isinstance(part, list | tuple) else [float(part)]
    return flat
