"""Two models whose special tokens differ in name alone: refused by name, and read by id where told."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from conftest import RENAMED_TOKENS
from flexalign.errors import PairMismatchError
from flexalign.generation import TwoModelDecoder
from flexalign.models.compatibility import RenamedToken, examine_pair, renamed_tokens
from flexalign.models.loading import load_model
from flexalign.models.pair import ModelPair

IDS = {"input_ids": torch.arange(5, 15)[None]}
TEMPLATES = "ignore:the chat templates differ"

pytestmark = pytest.mark.filterwarnings(TEMPLATES)


@pytest.fixture
def edited(renamed_pair, tmp_path):
    """A copy of the aligned model whose tokenizer.json is changed by a function."""

    def copy(change):
        folder = shutil.copytree(renamed_pair.aligned, tmp_path / "edited")
        file = folder / "tokenizer.json"
        state = json.loads(file.read_text(encoding="utf-8"))
        change(state)
        file.write_text(json.dumps(state), encoding="utf-8")
        return folder

    return copy


def expected_tokens(folder):
    ids = AutoTokenizer.from_pretrained(folder).get_vocab()
    return {RenamedToken(ids[name], name, other) for name, other in RENAMED_TOKENS.items()}


def test_renamed_tokens_are_named_with_the_way_on(renamed_pair):
    with pytest.raises(PairMismatchError, match="in the names of special tokens alone") as caught:
        ModelPair.load(*renamed_pair)
    message = str(caught.value)
    for id_, name, other in expected_tokens(renamed_pair.reference):
        assert str(id_) in message
        assert repr(name) in message
        assert repr(other) in message
    assert "--by-id (by_id: true in a recipe, by_id=True in Python)" in message
    assert "ends a response" not in message  # the same id ends it


def test_by_id_the_pair_is_the_same_pair(renamed_pair, tiny_pair, capsys):
    pair = ModelPair.load(*renamed_pair, by_id=True)
    said = capsys.readouterr().err
    for id_, name, other in expected_tokens(renamed_pair.reference):
        assert str(id_) in said
        assert repr(name) in said
        assert repr(other) in said
    reference = AutoTokenizer.from_pretrained(renamed_pair.reference)
    assert pair.tokenizer.get_vocab() == reference.get_vocab()
    assert pair.tokenizer.chat_template == reference.chat_template
    with torch.no_grad():
        one, other = (load_model(folder)(**IDS).logits.double() for folder in tiny_pair)
        for lam in (0.0, 0.5, 2.0):
            found = TwoModelDecoder(pair).generate(
                **IDS, lam=lam, max_new_tokens=1, do_sample=False
            )
            expected = ((1 - lam) * one + lam * other)[0, -1, : pair.vocab_size].argmax()
            assert found[0, -1] == expected


def test_the_facts_hold_the_names(renamed_pair, tiny_pair):
    facts = examine_pair(*renamed_pair, by_id=True)
    assert facts.fits
    assert set(facts.renamed) == expected_tokens(renamed_pair.reference)
    assert facts.to_json()["renamed"] == [token._asdict() for token in facts.renamed]
    assert facts.reference.tokenizer is facts.tokenizer
    json.dumps(facts.to_json()["renamed"])
    assert examine_pair(*renamed_pair).renamed == ()
    same = examine_pair(*tiny_pair, by_id=True)
    assert (same.fits, same.renamed, same.notes) == (True, (), ())


def test_thinking_that_the_other_tokenizer_does_not_name_is_a_warning(renamed_pair):
    for pair, is_lost in ((renamed_pair, False), (renamed_pair[::-1], True)):
        facts = examine_pair(*pair, by_id=True)
        warned = [text for text in facts.warnings if "thinking tags" in text]
        assert len(warned) == int(is_lost)
        if is_lost:
            assert "<think> and </think>" in warned[0]
            assert "give the aligned model as the reference" in warned[0]


def test_a_template_that_the_reference_lacks_brings_its_tokenizer(renamed_pair, tmp_path):
    bare = shutil.copytree(renamed_pair.reference, tmp_path / "bare")
    for file in (bare / "chat_template.jinja", bare / "tokenizer_config.json"):
        if file.suffix == ".jinja":
            file.unlink()
    facts = examine_pair(bare, renamed_pair.aligned, by_id=True)
    assert facts.tokenizer is facts.aligned.tokenizer
    assert "the names of the aligned model used for both" in facts.notes[-1]
    assert any("thinking tags" in warning for warning in facts.warnings) == (
        facts.reference.thinking_tags is not None
    )


def ordinary(state):
    """Another text at an ordinary id, beside the renamed tokens."""
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    last = max(vocab, key=vocab.get)
    vocab["zz"] = vocab.pop(last)
    merges[:] = [merge for merge in merges if "".join(merge) != last] + [["z", "z"]]


def exchange(state):
    """Exchange two special tokens: the names are there, at the other ids."""
    names = {"<|pad|>": "<|bos|>", "<|bos|>": "<|pad|>"}
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocab = state["model"]["vocab"]
    vocab["<|pad|>"], vocab["<|bos|>"] = vocab["<|bos|>"], vocab["<|pad|>"]


def extend(state):
    last = dict(state["added_tokens"][-1], id=320, content="<|tool|>")
    state["added_tokens"].append(last)


def demote(state):
    """A renamed token that the tokenizer does not list as special."""
    state["added_tokens"] = [
        one for one in state["added_tokens"] if "box_end" not in one["content"]
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (ordinary, r"differ: '\w+' \(319\) is in the reference alone; 'zz' \(319\).*by id neither"),
        (exchange, r"differ: '<\|pad\|>' is 0 in the reference and 1 in the.*by id neither"),
        (extend, r"differ: '<\|endoftext\|>' is 320 in the reference and 321.*by id neither"),
        (demote, r"differ: '</think>' \(5\) is in the reference alone.*by id neither"),
    ],
)
def test_what_differs_in_more_than_names_is_refused_by_id(renamed_pair, edited, change, words):
    other = edited(change)
    with pytest.raises(PairMismatchError, match=words):
        ModelPair.load(renamed_pair.reference, other, by_id=True)
    one, two = map(AutoTokenizer.from_pretrained, (renamed_pair.reference, other))
    assert renamed_tokens(one, two) == ()


def test_ends_of_two_ids_are_refused_by_id(renamed_pair, tmp_path):
    other = shutil.copytree(renamed_pair.aligned, tmp_path / "other")
    file = other / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(settings | {"eos_token": "<|User|>"}), encoding="utf-8")
    with pytest.raises(PairMismatchError, match=r"'<\|im_end\|>', the aligned model with '<\|User"):
        ModelPair.load(renamed_pair.reference, other, by_id=True)
