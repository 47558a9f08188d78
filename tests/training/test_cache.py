"""The cache's files: what is in them, and what happens when they or their writers are damaged."""

import errno
import json
import mmap
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from flexalign.errors import CheckpointError, ConfigError
from flexalign.models.pair import ModelPair
from flexalign.training.hidden_cache import Form, HiddenStateCache, write_cache
from flexalign.training.hidden_cache import fill as filling_module
from flexalign.training.hidden_cache.documents import Document, documents_of
from flexalign.training.hidden_cache.format import claim, plan_shards

from .conftest import Modules, lora, make_rows

IDENTITY = {"pair": ["a", "b"], "data": "c", "max_length": 64}
WIDTH, VOCAB = 64, 320


@pytest.fixture
def documents() -> list[Document]:
    return [document for row in make_rows(9) for document in documents_of(row)]


@pytest.fixture
def fill(
    tmp_path: Path, modules: Modules, tiny_tokenizer: Any, documents: list[Document]
) -> Callable[..., HiddenStateCache]:
    """Fill a folder, in shards of a few documents; counts how often the pair is loaded."""

    def make(
        folder: str = "cache", identity: dict[str, Any] = IDENTITY, **options: Any
    ) -> HiddenStateCache:
        def load_pair() -> ModelPair:
            make.loads += 1
            return ModelPair.of(modules.reference, modules.aligned, tiny_tokenizer)

        float32 = torch.float32
        return write_cache(
            tmp_path / folder,
            identity,
            lambda: documents,
            load_pair,
            **{
                "form": Form((WIDTH, WIDTH), VOCAB, False, float32, float32),
                "shard_bytes": 30 * 2 * WIDTH * 4,
                **options,
            },
        )

    make.loads = 0
    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_states_are_what_the_models_give_alone(
    fill: Callable[..., HiddenStateCache], modules: Modules, documents: list[Document]
) -> None:
    cache = fill()
    assert cache.facts["tokens"] == sum(len(document.positions) for document in documents)
    assert cache.facts["input_tokens"] == sum(len(document.tokens) for document in documents)
    assert len(cache.facts["files"]) > 3
    for document in documents:
        ids = torch.from_numpy(document.tokens)[None]
        for side, model in zip(("reference", "aligned"), modules, strict=True):
            with torch.no_grad():
                expected = model.double().model(input_ids=ids).last_hidden_state[0]
            found = getattr(cache.states(document), side)
            torch.testing.assert_close(
                found.double(), expected[document.positions], rtol=0, atol=2e-5
            )
    heads = cache.heads(torch.device("cpu"))
    for head, model in zip(heads, modules, strict=True):
        assert torch.equal(head.weight.double(), model.lm_head.weight[:VOCAB])


def test_the_size_is_two_hidden_states_for_each_token(
    fill: Callable[..., HiddenStateCache], tmp_path: Path
) -> None:
    said: list[str] = []
    cache = fill(say=said.append)
    tokens = cache.facts["tokens"]
    stored = sum(
        tensors[side].numel() * 4
        for path in sorted((tmp_path / "cache").glob("shard-*.safetensors"))
        for tensors in [load_file(path)]
        for side in ("reference", "aligned")
    )
    assert stored == tokens * 2 * WIDTH * 4
    assert any(f"{tokens:,} response tokens × {2 * WIDTH * 4} bytes" in line for line in said)
    assert any("GiB are free" in line for line in said)


def test_no_room_is_refused_before_weights_are_loaded(
    fill: Callable[..., HiddenStateCache], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"GiB are free.*--anyway"):
        fill()
    assert fill.loads == 0
    assert not (tmp_path / "cache").exists()
    assert fill(anyway=True).facts["tokens"]


def test_a_flipped_byte_is_found_and_its_file_alone_made_again(
    fill: Callable[..., HiddenStateCache], tmp_path: Path
) -> None:
    fill()
    folder = tmp_path / "cache"
    before = contents(folder)
    for name in ("shard-00001.safetensors", "heads.safetensors"):
        damaged = bytearray(before[name])
        damaged[len(damaged) // 2] ^= 1
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{name} is corrupt.*flexalign cache again"):
            HiddenStateCache.open(folder)
        others = {path: path.stat().st_mtime_ns for path in folder.glob("shard-00002*")}
        said: list[str] = []
        fill(say=said.append)
        assert any(f"{name} is corrupt" in line for line in said)
        assert contents(folder) == before
        assert others[folder / "shard-00002.safetensors"] == (
            (folder / "shard-00002.safetensors").stat().st_mtime_ns
        )
        HiddenStateCache.open(folder)


@pytest.mark.parametrize("missing", ["shard-00002.safetensors", "shard-00002.json"])
def test_a_missing_file_is_made_again(
    fill: Callable[..., HiddenStateCache], tmp_path: Path, missing: str
) -> None:
    fill()
    folder = tmp_path / "cache"
    before = contents(folder)
    (folder / missing).unlink()
    fill()
    assert contents(folder) == before


def test_a_finished_cache_loads_no_model(fill: Callable[..., HiddenStateCache]) -> None:
    fill()
    assert fill.loads == 1
    fill()
    assert fill.loads == 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(5))
def test_a_writer_killed_at_any_file_is_gone_on_from(
    fill: Callable[..., HiddenStateCache],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: int,
) -> None:
    whole = contents(fill("whole").folder)
    original, calls = filling_module.save_tensors, []

    def save(path: Path, tensors: Any, **facts: Any) -> None:
        calls.append(path)
        if len(calls) == moment + 1:
            if moment % 2:  # the file is there and its note is not
                original(path, tensors, **facts)
                path.with_suffix(".json").unlink()
            else:
                (path.parent / f".{path.name}.somewhere-1.partial").write_bytes(b"half")
            raise Killed
        original(path, tensors, **facts)

    monkeypatch.setattr(filling_module, "save_tensors", save)
    with pytest.raises(Killed):
        fill()
    with pytest.raises(ConfigError, match="no finished cache"):
        HiddenStateCache.open(tmp_path / "cache")
    monkeypatch.setattr(filling_module, "save_tensors", original)
    cache = fill()
    assert contents(cache.folder) == whole
    assert not list(cache.folder.glob(".*.partial"))


@pytest.mark.parametrize(
    ("identity", "named"),
    [
        ({"pair": ["a", "z"]}, r"the pair \(pair was \[\"a\", \"b\"\], now \[\"a\", \"z\"\]\)"),
        ({"data": "z"}, "the data set"),
        ({"max_length": 32}, r"max_length was 64, now 32"),
    ],
)
def test_another_cache_is_not_written_over(
    fill: Callable[..., HiddenStateCache], identity: dict[str, Any], named: str
) -> None:
    fill()
    with pytest.raises(ConfigError, match=named):
        fill(identity=IDENTITY | identity)
    half = Form((WIDTH, WIDTH), VOCAB, False, torch.bfloat16, torch.float32)
    with pytest.raises(ConfigError, match="dtype was"):
        fill(form=half)


def test_a_folder_of_something_else_is_left_alone(
    fill: Callable[..., HiddenStateCache], tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="of no cache"):
        fill()


def test_one_process_at_a_time_holds_a_claim(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flexalign.training.hidden_cache.format import claim\n"
        "with claim(Path(sys.argv[1]), int(sys.argv[2])) as mine: print(mine)"
    )

    def other(index: int) -> str:
        command = [sys.executable, "-c", code, str(tmp_path), str(index)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with claim(tmp_path, 3) as mine:
        assert mine
        assert other(3) == "False"
        assert other(4) == "True"
    assert other(3) == "True"


def test_shards_hold_whole_documents_in_order() -> None:
    assert plan_shards([3, 3, 3, 9, 1, 1], 10, 70) == [
        range(0, 2),
        range(2, 3),
        range(3, 4),
        range(4, 6),
    ]
    assert plan_shards([], 10, 70) == []


def test_keys_follow_the_tokens_and_what_counts() -> None:
    def key(tokens: Iterable[int], labels: Iterable[int]) -> bytes:
        return Document.of(list(tokens), list(labels)).key

    plain = key([1, 2, 3, 4], [-100, 2, 3, 4])
    assert plain == key([1, 2, 3, 4], [1, 2, 3, 4])  # the first token is never predicted
    assert plain != key([1, 2, 3, 5], [-100, 2, 3, 5])
    assert plain != key([1, 2, 3, 4], [-100, -100, 3, 4])
    packed = {"input_ids": [1, 2, 3, 7, 8], "labels": [-100, 2, 3, 7, 8], "seq_lengths": [3, 2]}
    assert [document.tokens.tolist() for document in documents_of(packed)] == [[1, 2, 3], [7, 8]]


def test_the_manifest_says_what_the_cache_is_of(
    fill: Callable[..., HiddenStateCache], tmp_path: Path
) -> None:
    fill()
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert IDENTITY.items() <= manifest.items()
    assert manifest["dtype"] == "float32"
    assert manifest["documents"] == 9
    assert all(len(note["sha256"]) == 64 for note in manifest["files"].values())


def test_files_that_another_process_makes_are_waited_for_and_not_made_twice(
    fill: Callable[..., HiddenStateCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill("other")
    assert fill.loads == 1
    taken, waits = [True], []

    @contextmanager
    def claimed_by_the_other(folder: Path, index: int) -> Iterator[bool]:
        yield not taken[0]

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:  # the other process is done, and lets go
            for file in (tmp_path / "other").iterdir():
                shutil.copyfile(file, tmp_path / "cache" / file.name)
            (tmp_path / "cache" / "manifest.json").unlink(missing_ok=True)
            taken[0] = False

    monkeypatch.setattr(filling_module, "claim", claimed_by_the_other)
    monkeypatch.setattr(filling_module.time, "sleep", wait)
    seen: list[tuple[int, int]] = []
    cache = fill(progress=lambda done, total: seen.append((done, total)))
    assert len(waits) == 2
    assert fill.loads == 1
    assert seen[-1] == (cache.facts["tokens"], cache.facts["tokens"])
    assert cache.facts["files"] == HiddenStateCache.open(tmp_path / "other").facts["files"]


def test_the_system_is_asked_to_read_ahead_what_a_batch_takes(
    fill: Callable[..., HiddenStateCache],
    documents: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    class Watched(mmap.mmap):
        def madvise(self, *given: int) -> None:
            super().madvise(*given)
            asked.append(given)

    monkeypatch.setattr(mmap, "mmap", Watched)
    cache = fill()
    for document in documents:
        del asked[:]
        states = cache.states(document)
        for (advice, start, length), tensor in zip(asked, states, strict=True):
            assert advice == mmap.MADV_WILLNEED
            assert start % mmap.PAGESIZE == 0
            size = tensor.numel() * tensor.element_size()
            assert size <= length < size + mmap.PAGESIZE


def test_a_file_system_without_locks_grants_every_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    with claim(tmp_path, 0) as mine, claim(tmp_path, 0) as too:
        assert mine
        assert too


def test_a_cut_off_file_is_made_again(
    fill: Callable[..., HiddenStateCache], tmp_path: Path
) -> None:
    fill()
    folder = tmp_path / "cache"
    before = contents(folder)
    (folder / "shard-00001.safetensors").write_bytes(before["shard-00001.safetensors"][:-9])
    with pytest.raises(CheckpointError, match=r"shard-00001\.safetensors is cut off"):
        HiddenStateCache.open(folder)
    fill()
    assert contents(folder) == before


def test_data_without_a_response_fill_no_cache(
    fill: Callable[..., HiddenStateCache], documents: list[Document]
) -> None:
    documents.clear()
    with pytest.raises(ConfigError, match="no row keeps a response token within the cut-off"):
        fill()


def test_a_head_is_kept_with_its_bias_and_a_shared_one_once(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, documents: list[Document]
) -> None:
    base = tiny_model("phi", seed=3)
    adapted = get_peft_model(base, lora(target_modules=["q_proj"], init_lora_weights=False))
    form = Form((WIDTH, WIDTH), VOCAB, True, torch.float32, torch.float32)
    cache = write_cache(
        tmp_path / "cache",
        IDENTITY,
        lambda: documents,
        lambda: ModelPair.of(base, adapted, tiny_tokenizer),
        form=form,
    )
    heads = cache.heads(torch.device("cpu"))
    assert heads.aligned is heads.reference
    assert heads.reference.bias is not None
    assert torch.equal(heads.reference.bias, base.lm_head.bias)
    assert torch.equal(heads.reference.weight, base.lm_head.weight)
