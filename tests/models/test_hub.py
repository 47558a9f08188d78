"""Hub ids: how they are read, what goes before them, and what is fetched from a hub, and when."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from flexalign.calibration.calibrate import plan_calibration
from flexalign.errors import ConfigError
from flexalign.evaluation.tasks import load_task
from flexalign.inra import InRaModel
from flexalign.lora_dial import LoRADialConfig
from flexalign.models.compatibility import examine_pair
from flexalign.models.hub import HubName, downloads_wait, fetch_weights, name_of
from flexalign.models.loading import fingerprint, load_model
from flexalign.models.sources import (
    base_of,
    hub_id,
    name_base_by_id,
    resolve,
    resolve_adapter,
)
from flexalign.systems.dials import read_dial
from stand_in_hub import Hub, Repository, cache_snapshot, folder_files

CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


# Names.


@pytest.mark.parametrize(
    "text",
    [
        *("Qwen/Qwen3-0.6B", "a/b", "out/fast", "my_org/x.y", "a" * 90 + "/b"),
        *("./a/b", "/a/b", "~/a", "a/b/c", "a", "a--b/c", "a/b..c", "a/b.git", "-a/b", "a/b-"),
        *("é/b", "a b/c", "a/" + "b" * 97, "miniature:fast", "http://a/b", "", "a/"),
    ],
)
def test_a_name_is_what_the_hub_takes_as_one(text: str):
    try:
        validate_repo_id(text)
        is_valid = text.count("/") == 1  # the hub's own models without an owner are old
    except HFValidationError:
        is_valid = False
    assert HubName.parse(text) == (HubName(text) if is_valid else None)


def test_a_revision_follows_an_at():
    assert HubName.parse("a/b@refs/pr/1") == HubName("a/b", "refs/pr/1")
    assert str(HubName("a/b", "v1")) == "a/b@v1"
    assert HubName.parse("a/b@") is None
    assert HubName.parse("a/b@v 1") is None


def test_a_folder_goes_before_a_repository(
    tiny_pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme/base").symlink_to(tiny_pair.reference)
    monkeypatch.chdir(tmp_path)
    assert resolve("acme/base").path == Path("acme/base")
    assert resolve_adapter("acme/base") == Path("acme/base")
    assert hub_id("acme/base") is None
    assert hub_id("acme/other") == "acme/other"
    assert hub_id("miniature") is None


# Offline: the cache alone, which is laid out as huggingface_hub does.


def test_offline_a_snapshot_of_the_cache_is_used(tiny_pair: Any):
    snapshot = cache_snapshot("acme/kept", folder_files(tiny_pair.reference))
    source = resolve("acme/kept")
    assert (source.path, source.name) == (snapshot, "acme/kept")
    assert name_of(source.path) == HubName("acme/kept")
    assert hub_id(source) == "acme/kept"
    assert fingerprint("acme/kept") == fingerprint(tiny_pair.reference)
    with downloads_wait() as waiting:
        assert fetch_weights(snapshot)  # they are there
    assert waiting.sizes == {}
    assert load_model("acme/kept").config.model_type == "qwen2"


def test_offline_an_adapter_finds_its_base_in_the_cache(tiny_pair: Any, tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(tiny_pair.reference)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.peft_config["default"].base_model_name_or_path = "acme/base"
    wrapped.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    with pytest.raises(ConfigError, match=r"is a PEFT adapter on 'acme/base': there is no model"):
        base_of(resolve(str(tmp_path / "lora")))
    # A reference that is here is not compared with a base that is not.
    facts = examine_pair(str(tiny_pair.reference), str(tmp_path / "lora"))
    doubts = [warning for warning in facts.warnings if "not here" in warning]
    assert len(doubts) == 1
    assert "says that its base is acme/base, which is not here" in doubts[0]

    cache_snapshot("acme/base", folder_files(tiny_pair.reference))
    cache_snapshot("acme/lora", folder_files(tmp_path / "lora"))
    assert base_of(resolve("acme/lora")).path == resolve("acme/base").path
    facts = examine_pair("acme/base", "acme/lora")
    assert (facts.shared_base, facts.problems) == (True, ())
    assert not [warning for warning in facts.warnings if "not here" in warning]


def test_a_trained_adapter_names_its_base_by_the_id(tiny_pair: Any, tmp_path: Path):
    snapshot = cache_snapshot("acme/named", folder_files(tiny_pair.reference))
    file = tmp_path / "adapter_config.json"
    for named, wanted in ((str(snapshot), "acme/named"), ("models/base", "models/base")):
        resolve("acme/named")
        file.write_text(json.dumps({"base_model_name_or_path": named, "r": 2}))
        name_base_by_id(tmp_path)
        told = json.loads(file.read_text())
        assert (told["base_model_name_or_path"], told["r"]) == (wanted, 2)


def test_a_dial_from_the_hub_is_calibrated_into_a_copy(tiny_pair: Any, tmp_path: Path):
    cache_snapshot("acme/model", folder_files(tiny_pair.reference))
    InRaModel.create("acme/model").save_pretrained(tmp_path)
    snapshot = cache_snapshot("acme/dial", folder_files(tmp_path))
    assert resolve_adapter("acme/dial") == snapshot
    assert read_dial("acme/dial").base == "acme/model"
    with pytest.raises(ConfigError, match=r"is from the hub.*--save-to"):
        plan_calibration("acme/model", "acme/dial", load_task("miniature"))


@pytest.mark.parametrize("find", [resolve, resolve_adapter])
def test_offline_what_is_not_in_the_cache_is_one_sentence(find: Any):
    with pytest.raises(ConfigError) as told:
        find("acme/nowhere@v2")
    message = str(told.value)
    kind = "model" if find is resolve else "adapter"
    assert message.startswith(f"there is no {kind} 'acme/nowhere@v2': it is no folder here, ")
    assert "HF_HUB_OFFLINE is set" in message
    assert message.endswith("hf download acme/nowhere --revision v2.")
    assert "\n" not in message


def test_a_path_is_never_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id(Path("acme/base")) is None  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="it is no folder here, and no known name"):
        resolve(Path("acme/base"))


# A hub on the loopback. Its address is read at import, so each caller is a process of its own.


@pytest.fixture
def hub(tiny_pair: Any) -> Iterator[Hub]:
    stand_in = Hub()
    for name, folder in (("reference", tiny_pair.reference), ("aligned", tiny_pair.aligned)):
        files = folder_files(folder, README_md=CARD)
        files["onnx/config.json"] = b"{}"
        files["pytorch_model.bin"] = b"never fetched"
        stand_in.repos[f"acme/{name}"] = Repository({"main": files, "v1": dict(files)})
    with stand_in.running():
        yield stand_in
    assert stand_in.refused == []


def _run(hub: Hub, home: Path, *command: object, **environment: str) -> Any:
    given = {**os.environ, **hub.environment(home), **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=given, capture_output=True, text=True, cwd=home
    )


def _flexalign(hub: Hub, home: Path, *arguments: object, **environment: str) -> Any:
    return _run(hub, home, "-m", "flexalign", *arguments, **environment)


def _recipe(home: Path, **keys: Any) -> Path:
    rows = [{"prompt": f"{n}+1", "completion": f"<think>{n}</think>{n + 1}"} for n in range(8)]
    (home / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "reference": "acme/reference",
        "aligned": "acme/aligned@v1",
        "data": "traces.jsonl",
        "output": "out",
        "lambda": 1.0,
        "training": {"max_steps": 1, "gradient_accumulation_steps": 1, "max_length": 64},
    }
    path = home / "recipe.json"  # JSON is YAML
    path.write_text(json.dumps(tree | keys))
    return path


ASK = """
import json, sys
from flexalign.errors import ConfigError
from flexalign.models.hub import downloads_wait, fetch_weights
from flexalign.models.sources import resolve

told = {}
for name in sys.argv[1:]:
    try:
        told[name] = sorted(path.name for path in resolve(name).path.iterdir())
    except ConfigError as error:
        told[name] = str(error)
print(json.dumps(told))
"""


@pytest.mark.slow
def test_what_cannot_be_had_is_said_in_one_sentence(hub: Hub, tmp_path: Path):
    hub.repos["acme/gated"] = Repository(
        {"main": folder_files(tmp_path, config_json="{}")}, gated=True
    )
    hub.repos["acme/empty"] = Repository({"main": {"README.md": b"", "model.gguf": b""}})
    names = ["acme/no", "acme/gated", "acme/reference@v9", "acme/empty", "acme/reference"]
    result = _run(hub, tmp_path, "-c", ASK, *names)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert "no repository of this name that you may read" in told["acme/no"]
    assert f"{hub.url}/acme/gated" in told["acme/gated"]
    assert "is gated, and access is not granted" in told["acme/gated"]
    assert "has no revision 'v9'" in told["acme/reference@v9"]
    assert "has no config.json at the hub" in told["acme/empty"]
    assert "hf download acme/empty FILE.gguf" in told["acme/empty"]
    for name in names[:-1]:
        assert told[name].endswith(".")
        assert "\n" not in told[name]
    assert "config.json" in told["acme/reference"]
    assert not {"model.safetensors", "pytorch_model.bin", "onnx"} & set(told["acme/reference"])

    # A hub that does not answer, and then the cache of what was fetched before.
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    result = _run(hub, tmp_path, "-c", ASK, "acme/other", "acme/reference", **gone)
    told = json.loads(result.stdout)
    assert "the hub (http://127.0.0.1:9) cannot be asked for it" in told["acme/other"]
    assert "config.json" in told["acme/reference"]


@pytest.mark.slow
def test_a_dry_run_says_what_it_would_download(hub: Hub, tmp_path: Path):
    recipe = _recipe(tmp_path)
    result = _flexalign(hub, tmp_path, "realign", recipe, "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    size = len(hub.repos["acme/reference"].files("main")["model.safetensors"])
    facts = json.loads(result.stdout)
    assert facts["downloads"] == {"acme/reference": size, "acme/aligned@v1": size}
    assert facts["output_state"] == "new"
    assert hub.weights_fetched() == []
    assert "acme/reference/config.json" in hub.fetched
    assert "acme/reference/onnx/config.json" not in hub.fetched


@pytest.mark.slow
def test_a_model_of_the_hub_becomes_gguf_and_a_dry_run_fetches_no_weights(hub: Hub, tmp_path: Path):
    pytest.importorskip("gguf", reason="gguf is not installed (flexalign[gguf])")
    command = ("export", "gguf", "acme/reference", "out.gguf", "--json")
    result = _flexalign(hub, tmp_path, *command, "--dry-run")
    assert result.returncode == 0, result.stderr
    planned = json.loads(result.stdout)
    assert "would download acme/reference" in result.stderr
    assert hub.weights_fetched() == []
    assert not (tmp_path / "out.gguf").exists()

    result = _flexalign(hub, tmp_path, *command)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == planned | {"dry_run": False}
    assert (tmp_path / "out.gguf").stat().st_size > planned["bytes"]


@pytest.mark.slow
def test_a_run_from_the_hub_and_back(hub: Hub, tmp_path: Path):
    # Nothing large is fetched before what needs no weights is right.
    wrong = _recipe(tmp_path, data="nowhere.jsonl")
    result = _flexalign(hub, tmp_path, "realign", wrong)
    assert result.returncode == 2
    assert "nowhere.jsonl" in result.stderr
    assert hub.weights_fetched() == []

    pushed = ("--push", "me/student", "--private")
    result = _flexalign(hub, tmp_path, "realign", _recipe(tmp_path), *pushed)
    assert result.returncode == 0, result.stderr
    weights = ["acme/aligned/model.safetensors", "acme/reference/model.safetensors"]
    assert sorted(hub.weights_fetched()) == weights
    assert f"uploaded: {hub.url}/me/student" in result.stderr

    student = hub.repos["me/student"]
    assert student.private
    files = student.files("main")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert not [name for name in files if name.startswith("checkpoint-")]
    assert files["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()
    header = files["README.md"].decode().split("---")[1]
    assert "base_model: acme/reference\n" in header
    assert "license: apache-2.0\n" in header

    # The same again: it is done, the models are in the cache, and a failed upload loses nothing.
    hub.fetched.clear()
    hub.fails_to_commit = True
    result = _flexalign(hub, tmp_path, "realign", _recipe(tmp_path), "--push", "me/again")
    assert result.returncode == 1
    assert "out is complete, and its upload to me/again failed" in result.stderr
    assert "upload it with: hf upload me/again out . --exclude" in result.stderr
    assert hub.fetched == []
    assert (tmp_path / "out/model.safetensors").is_file()


CHECK = """
import json, sys
from flexalign.errors import ConfigError
from flexalign.models.push import Push

told = {}
for repo in sys.argv[1:]:
    try:
        Push.checked(repo, private=True).create()
        told[repo] = None
    except ConfigError as error:
        told[repo] = str(error)
print(json.dumps(told))
"""


@pytest.mark.slow
def test_an_upload_that_could_not_succeed_is_refused_before(hub: Hub, tmp_path: Path):
    names = ["student", "me/student@v1", "other/student", "acme/reference", "me/new"]
    result = _run(hub, tmp_path, "-c", CHECK, *names)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert "write the repository as org/name" in told["student"]
    assert "without a revision" in told["me/student@v1"]
    assert "me may not write to other; name a repository of me, acme." in told["other/student"]
    assert "it exists and is public" in told["acme/reference"]
    assert told["me/new"] is None
    assert hub.repos["me/new"].private

    says = {"hf_reads": "may read alone", "hf_unknown": "does not take your token"}
    for token, message in says.items():
        result = _run(hub, tmp_path, "-c", CHECK, "me/other", HF_TOKEN=token)
        assert message in json.loads(result.stdout)["me/other"]
    given = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    result = subprocess.run(
        [sys.executable, "-c", CHECK, "me/other"],
        env={**given, **hub.environment(tmp_path, token=None)},
        capture_output=True,
        text=True,
    )
    assert "needs a token that may write" in json.loads(result.stdout)["me/other"]
    assert "me/other" not in hub.repos


@pytest.mark.slow
def test_a_dial_from_the_hub_is_planned_and_exported(hub: Hub, tiny_pair: Any, tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(tiny_pair.reference)
    made = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    made.peft_config["default"].base_model_name_or_path = "acme/reference"
    made.save_pretrained(tmp_path / "made", save_embedding_layers=False)
    mark = fingerprint(tiny_pair.reference)
    LoRADialConfig("acme/reference", mark, lambda_range=(0.0, 2.0)).save(tmp_path / "made")
    hub.repos["acme/dial"] = Repository({"main": folder_files(tmp_path / "made")})
    dial = hub.repos["acme/dial"].files("main")["adapter_model.safetensors"]
    whole = hub.repos["acme/reference"].files("main")["model.safetensors"]

    # Dry runs: what would be downloaded is said, and left where it is.
    (tmp_path / "q.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    asked = ("dial:acme/reference,acme/dial", "--task", "q.jsonl", "--lambda", "0,2", "--dry-run")
    result = _flexalign(hub, tmp_path, "evaluate", *asked)
    assert result.returncode == 0, result.stderr
    assert "would download acme/reference (" in result.stderr
    assert "acme/dial (" in result.stderr
    recipe = {"base": "acme/reference", "adapter": "acme/dial", "lambda": 1.5, "output": "baked"}
    (tmp_path / "bake.json").write_text(json.dumps(recipe))
    result = _flexalign(hub, tmp_path, "bake", "bake.json", "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    sizes = {"acme/reference": len(whole), "acme/dial": len(dial)}
    assert json.loads(result.stdout)["downloads"] == sizes
    assert hub.weights_fetched() == []

    pushed = ("--lambda", "0.5,2", "-o", "adapters", "--push", "acme/adapters")
    result = _flexalign(hub, tmp_path, "export", "lora", "acme/dial", *pushed)
    assert result.returncode == 0, result.stderr
    assert hub.weights_fetched() == ["acme/dial/adapter_model.safetensors"]
    files = hub.repos["acme/adapters"].files("main")
    assert {"lambda=0.5/adapter_model.safetensors", "lambda=2/adapter_config.json"} <= set(files)
    (tmp_path / "README.md").write_bytes(files["README.md"])
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.base_model_relation) == ("acme/reference", "adapter")
    assert (data.license, data.library_name) == ("apache-2.0", "peft")


@pytest.mark.slow
def test_a_calibrated_dial_is_uploaded(hub: Hub, tmp_path: Path):
    asked = ("miniature", "--adapter", "miniature:fast", "--task", "miniature", "--limit", 24)
    asked = ("calibrate", *asked, "--save-to", "fast", "--push", "me/fast")
    told = _flexalign(hub, tmp_path, *asked, "--dry-run")
    assert told.returncode == 0, told.stderr
    assert "would upload fast to me/fast at the end" in told.stderr
    assert "me/fast" not in hub.repos

    result = _flexalign(hub, tmp_path, *asked, "--dial", "adaptive", "--top-k", 20)
    assert result.returncode == 0, result.stderr
    assert f"uploaded: {hub.url}/me/fast" in result.stderr
    files = hub.repos["me/fast"].files("main")
    assert files["inra_config.json"] == (tmp_path / "fast/inra_config.json").read_bytes()
    calibration = json.loads(files["inra_config.json"])["calibration"]
    assert calibration["sampling"]["top_k"] == 20
