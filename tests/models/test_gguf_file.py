"""GGUF files: read again by transformers' and gguf's own readers, and run by llama.cpp if it is here."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from flexalign.errors import CheckpointError, ConfigError, UnsupportedModelError
from flexalign.models.gguf_file import GGUFExport

gguf = pytest.importorskip("gguf", reason="gguf is not installed (flexalign[gguf])")

TEXT = "Hello, what's 1234 + 7? <|im_start|>user\n ünï <think>é</think><|im_end|>"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def saved(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> Any:
    """A factory of folders with a random model and a tokenizer; vectors are random too."""

    def save(
        family: str,
        tokenizer: Any = None,
        dtype: Any = torch.float32,
        rows: int = len(tiny_tokenizer) + 3,
        **config: Any,
    ) -> Any:
        tokenizer = tokenizer or tiny_tokenizer
        model = tiny_model(family, vocab_size=rows, **config)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    torch.nn.init.normal_(parameter, float("norm" in name), 0.3)
        model.to(dtype).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return model

    return save


@pytest.fixture
def export(tmp_path: Path) -> Any:
    """Write the saved model as GGUF and return the reader of the file."""

    def write(**options: Any) -> Any:
        GGUFExport.of(tmp_path / "model", tmp_path / "out" / "model.gguf", **options).write()
        return gguf.GGUFReader(tmp_path / "out" / "model.gguf")

    return write


def _value(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


def _tensor(reader: Any, name: str) -> Any:
    [found] = [tensor for tensor in reader.tensors if tensor.name == name]
    return found


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
        ("llama", {"num_attention_heads": 6, "hidden_size": 96}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),  # the only width that transformers' reader knows
    ],
)
def test_transformers_reads_the_same_model_and_tokenizer(
    saved: Any, export: Any, tiny_tokenizer: Any, tmp_path: Path, family: str, config: Any
):
    model = saved(family, **config)
    export()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf").eval()
    ids = torch.arange(1, 200)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)

    # transformers gives Qwen's tokenizers Qwen's rule for splitting, whatever the folder says.
    own = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert tokenizer(TEXT)["input_ids"] == own(TEXT)["input_ids"]
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|bos|>")


def test_rows_of_q_and_k_alternate_between_the_halves_of_a_head(saved: Any, export: Any):
    """transformers reads no SmolLM3 from GGUF, so this is held row by row."""
    model = saved("smollm3", num_hidden_layers=5)
    reader = export()
    assert _value(reader, "general.architecture") == "smollm3"
    attention = model.model.layers[4].self_attn
    for name, heads in (("q", 4), ("k", 2)):
        stored = _tensor(reader, f"blk.4.attn_{name}.weight").data
        mine = getattr(attention, f"{name}_proj").weight.detach().numpy().reshape(heads, 16, 64)
        for head in range(heads):
            for pair in range(8):
                for half in range(2):
                    row = stored[head * 16 + 2 * pair + half]
                    assert numpy.array_equal(row, mine[head, half * 8 + pair])
    values = _tensor(reader, "blk.4.attn_v.weight").data
    assert numpy.array_equal(values, attention.v_proj.weight.detach().numpy())


def test_llama3s_frequencies_are_divided_by_closed_form_factors(saved: Any, export: Any):
    saved("llama", rope_parameters=LLAMA3_ROPE)
    factors = _tensor(export(), "rope_freqs.weight").data
    for pair, factor in enumerate(factors):
        length = 2 * math.pi * 1e4 ** (2 * pair / 16)
        share = (64 / length - 1) / (4 - 1)  # 1 below a wavelength of 64/4, 0 above 64/1
        share = min(max(share, 0.0), 1.0)
        assert factor == pytest.approx(1 / ((1 - share) / 8 + share), rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_rotations_are_named(saved: Any, export: Any, kind: str):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    first = {"original_max_position_embeddings": 128} if kind == "yarn" else {}
    saved("qwen3", rope_parameters=rope | first)
    reader = export()
    assert _value(reader, "qwen3.rope.scaling.type") == kind
    assert _value(reader, "qwen3.rope.scaling.factor") == 4.0
    assert _value(reader, "qwen3.rope.freq_base") == 1e4
    if first:
        assert _value(reader, "qwen3.rope.scaling.original_context_length") == 128


@pytest.mark.parametrize(
    ("stored", "outtype", "kind"),
    [
        (torch.bfloat16, "auto", "BF16"),
        (torch.float16, "auto", "F16"),
        (torch.float32, "auto", "F32"),
        (torch.float32, "bf16", "BF16"),
        (torch.bfloat16, "f16", "F16"),
        (torch.bfloat16, "f32", "F32"),
    ],
)
def test_matrices_have_the_type_asked_for_and_vectors_are_float32(
    saved: Any, export: Any, stored: Any, outtype: str, kind: str
):
    model = saved("qwen2", dtype=stored)
    reader = export(outtype=outtype)
    matrix = _tensor(reader, "blk.1.ffn_down.weight")
    assert matrix.tensor_type.name == kind
    want = model.model.layers[1].mlp.down_proj.weight.detach()
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[kind]
    want = want.to(dtype).float().numpy()
    assert numpy.array_equal(gguf.quants.dequantize(matrix.data, matrix.tensor_type), want)

    for name, mine in (
        ("blk.1.attn_norm.weight", model.model.layers[1].input_layernorm.weight),
        ("blk.1.attn_k.bias", model.model.layers[1].self_attn.k_proj.bias),
    ):
        vector = _tensor(reader, name)
        assert vector.tensor_type.name == "F32"
        assert numpy.array_equal(vector.data, mine.detach().float().numpy())
    types = {"F32": 0, "F16": 1, "BF16": 32}
    assert _value(reader, "general.file_type") == types[kind]


def test_tokens_that_end_a_response_and_those_that_are_shown(
    saved: Any, export: Any, tiny_tokenizer: Any, tmp_path: Path
):
    model = saved("llama")
    ends = [tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id]
    model.generation_config.eos_token_id = ends
    model.generation_config.save_pretrained(tmp_path / "model")
    reader = export()

    key = "tokenizer.ggml."
    assert _value(reader, key + "eos_token_id") == ends[0]
    assert _value(reader, key + "eot_token_id") == ends[1]
    assert _value(reader, key + "bos_token_id") == tiny_tokenizer.bos_token_id
    assert _value(reader, key + "add_bos_token") is False
    tokens, types = _value(reader, key + "tokens"), _value(reader, key + "token_type")
    assert tokens[len(tiny_tokenizer) :] == [
        f"[PAD{len(tiny_tokenizer) + row}]" for row in range(3)
    ]
    kinds = {token: gguf.TokenType(kind).name for token, kind in zip(tokens, types, strict=True)}
    # The fixture calls the thinking tags special; llama.cpp would not show them.
    assert tiny_tokenizer.added_tokens_decoder[tokens.index("<think>")].special
    assert kinds["<think>"] == kinds["</think>"] == "USER_DEFINED"
    assert kinds["<|im_end|>"] == kinds["<|bos|>"] == "CONTROL"
    assert kinds["e"] == "NORMAL"
    assert kinds[tokens[-1]] == "UNUSED"

    text = (tmp_path / "out" / "model.Modelfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    stops = ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|pad|>"']
    assert [line for line in lines if line.startswith(("FROM", "PARAMETER"))] == [
        "FROM ./model.gguf",
        *stops,
    ]


@pytest.mark.parametrize(
    ("around", "begins", "ends"),
    [("<|bos|> $A", True, False), ("$A <|im_end|>", False, True), ("<|pad|> $A", None, None)],
)
def test_tokens_around_a_text_are_said(
    saved: Any, export: Any, tiny_tokenizer: Any, around: str, begins: Any, ends: Any
):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    ids = [
        (token, tokenizer.convert_tokens_to_ids(token)) for token in around.split() if "|" in token
    ]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=ids
    )
    saved("llama", tokenizer)
    if begins is None:
        with pytest.raises(UnsupportedModelError, match="puts other tokens around a text"):
            export()
        return
    reader = export()
    assert _value(reader, "tokenizer.ggml.add_bos_token") is begins
    assert _value(reader, "tokenizer.ggml.add_eos_token") is ends


def test_a_token_without_a_row_is_left_out_if_it_was_added(
    saved: Any, export: Any, tiny_tokenizer: Any, tmp_path: Path
):
    rows = len(tiny_tokenizer)
    saved("qwen2", rows=rows)
    own = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert own.unk_token_id == rows  # transformers' own addition
    tokens = _value(export(), "tokenizer.ggml.tokens")
    assert len(tokens) == rows
    assert own.unk_token not in tokens

    shutil.rmtree(tmp_path / "out")
    saved("llama", rows=rows - 1)
    with pytest.raises(CheckpointError, match=f"has the id {rows - 1}, and the model has"):
        export()


def test_a_window_limits_the_context(saved: Any, export: Any):
    saved("mistral", sliding_window=100)
    assert _value(export(), "llama.context_length") == 100


@pytest.mark.parametrize(
    ("before", "words_first", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
            False,
            "smollm",
        ),
        (QWEN2, False, "qwen2"),
        (QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"), True, "llama-bpe"),
        (QWEN2, True, None),
        (r"\w+", False, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False, None),
        (pre_tokenizers.Whitespace(), False, None),
    ],
)
def test_the_rule_that_splits_texts(
    saved: Any, export: Any, tiny_tokenizer: Any, before: Any, words_first: bool, name: str | None
):
    parts = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    parts["model"]["ignore_merges"] = words_first
    backend = type(tiny_tokenizer.backend_tokenizer).from_str(json.dumps(parts))
    if isinstance(before, str):
        split = pre_tokenizers.Split(Regex(before), "isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        before = pre_tokenizers.Sequence([split, last])
    backend.pre_tokenizer = before
    saved("llama", PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>"))
    if name is None:
        with pytest.raises(UnsupportedModelError, match=r"splits texts.*convert_hf_to_gguf.py"):
            export()
    else:
        assert _value(export(), "tokenizer.ggml.pre") == name


@pytest.mark.parametrize(
    ("family", "config", "says"),
    [
        ("gemma2", {}, "family 'gemma2' is not written here .only llama, .*convert_hf_to_gguf.py"),
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("qwen3", {"attention_bias": True}, "self_attn.*bias has no place"),
        ("llama", {"rope_parameters": {**LLAMA3_ROPE, "rope_type": "dynamic"}}, "'dynamic'"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ],
)
def test_what_has_no_form_is_refused_by_name(
    saved: Any, export: Any, family: str, config: Any, says: str, tmp_path: Path
):
    saved(family, **config)
    with pytest.raises(UnsupportedModelError, match=says):
        export()
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_refused_with_what_to_do(
    saved: Any, export: Any, tmp_path: Path, tiny_model: Any
):
    saved("qwen2")
    export()
    get_peft_model(
        tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear")
    ).save_pretrained(tmp_path / "lora")
    output = tmp_path / "new.gguf"
    for model, says in (
        (tmp_path / "lora", "is a LoRA and no model; bake one λ"),
        ("miniature:dial", "is a LoRA and no model; bake one λ"),
        ("miniature:fast", "is an InRa adapter and no model; bake one λ"),
        ("miniature:aligned", "WordLevel"),
        (tmp_path / "out" / "model.gguf", "is a GGUF file already"),
    ):
        with pytest.raises(UnsupportedModelError, match=says):
            GGUFExport.of(model, output)
    assert not output.exists()


def test_bad_outputs_are_refused(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved("qwen2")
    model = tmp_path / "model"
    (tmp_path / "there.gguf").touch()
    (tmp_path / "other.Modelfile").touch()
    for output, says in (
        (tmp_path / "there.gguf", "there.gguf is there already"),
        (tmp_path / "other.gguf", "other.Modelfile is there already"),
        (tmp_path / "model.bin", "end its name with .gguf"),
    ):
        with pytest.raises(ConfigError, match=says):
            GGUFExport.of(model, output)
    with pytest.raises(ConfigError, match="one of auto, f32, f16, bf16"):
        GGUFExport.of(model, tmp_path / "new.gguf", outtype="q8_0")

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"MiB, and .* are free there"):
        GGUFExport.of(model, tmp_path / "new" / "new.gguf")


def test_a_tensor_that_is_missing_or_too_large_leaves_nothing(
    saved: Any, export: Any, tmp_path: Path
):
    model = saved("llama", dtype=torch.bfloat16)
    folder = tmp_path / "model"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"model.layers.2.* is missing"):
        export()
    assert not (tmp_path / "out").exists()

    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = 1e5
    model.save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match=r"layers.1.mlp.down_proj.weight .*float16"):
        export(outtype="f16")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("mistral", {}),
        ("qwen2", {}),
        (
            "qwen3",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                }
            },
        ),
        ("smollm3", {"num_hidden_layers": 5}),
    ],
)
def test_llama_cpp_writes_the_same_32_tokens(
    saved: Any, export: Any, tiny_tokenizer: Any, tmp_path: Path, family: str, config: Any
):
    llama = pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")
    model = saved(family, initializer_range=0.2, **config)
    export()
    prompt = [(7 * place) % 300 + 10 for place in range(150)]

    # Tokens that are no whole characters do not come back one by one.
    texts = [tiny_tokenizer.decode([token]) for token in range(model.config.vocab_size)]
    whole = [text.isascii() and text != "" for text in texts]
    barred = [token for token, is_whole in enumerate(whole) if not is_whole or token < 8]

    settings = llama.CommonParams()
    settings.model.path = str(tmp_path / "out" / "model.gguf")
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 512, 1, False, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    answer = llama.Server(settings).handle_completions(
        {
            "prompt": prompt,
            "n_predict": 32,
            "temperature": 0,
            "n_probs": 1,
            "ignore_eos": True,
            "logit_bias": [[token, False] for token in barred],
        }
    )
    written = [step["id"] for step in answer["choices"][0]["logprobs"]["content"]]

    ids = list(prompt)
    for _ in range(32):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        logits[barred] = -math.inf
        ids.append(int(logits.argmax()))
    assert written == ids[len(prompt) :]
