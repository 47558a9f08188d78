"""Engines of vLLM that benchmarks ask: each in a process of its own, beside the plain model's."""

import contextlib
import multiprocessing
import random
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LAMBDA = 0.5
PROMPT = 32
RANK = 16


SHAPES: dict[str, dict[str, int]] = {
    "SmolLM2-135M": {},
    "Qwen2.5-1.5B": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
}
"""What the shape of a model changes in that of ``dials.SHAPE``, whose classes are Llama's."""


def folders(where: Path, rank: int, shape: str = "SmolLM2-135M") -> dict[str, Path]:
    """Write the plain model and those with a dial."""
    import torch
    from dials import SHAPE
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from flexalign.inra import InRaModel
    from flexalign.miniature import folder
    from flexalign.serving.vllm.folder import prepare_folder

    torch.manual_seed(0)
    sizes = SHAPE.to_dict() | SHAPES[shape] | {"max_position_embeddings": 4608}
    base = LlamaForCausalLM(LlamaConfig.from_dict(sizes)).bfloat16()
    base.save_pretrained(where / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder("reference") / name, where / "plain")
    InRaModel.create(where / "plain").save_pretrained(where / "inra-adapter")

    low = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, low).save_pretrained(where / "lora-adapter")
    return {
        "plain": where / "plain",
        "inra": prepare_folder(where / "plain", where / "inra-adapter", where / "inra"),
        "lora": prepare_folder(where / "plain", where / "lora-adapter", where / "lora"),
    }


class Engine:
    """An engine in a process of its own, which takes no time while it is not asked.

    Attributes:
        facts: What vLLM decided: the model runner, and the mode of CUDA graphs.
    """

    def __init__(
        self, folder: Path, compiled: bool, clock: str, longest: int, **options: Any
    ) -> None:
        """Start it, and return at once; further options are those of ``vllm.LLM``."""
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        arguments = (other, str(folder), compiled, clock, longest, options)
        context.Process(target=_run, args=arguments, daemon=True).start()
        other.close()  # so that the end of the process is seen
        self.facts: dict[str, Any] = {}

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: If it could not be started; the message is vLLM's.
            EOFError: If it ended.
        """
        found = self._pipe.recv()
        if isinstance(found, str):
            raise RuntimeError(found)
        self.facts = found

    def seconds(self, rows: int, length: int, tokens: int, seed: int) -> float:
        """Time so many rows of random prompts of that length, and so many new tokens each."""
        self._pipe.send((rows, length, tokens, seed))
        found: float = self._pipe.recv()
        return found

    def answers(
        self, prompts: list[list[int]], lams: list[float], tokens: int
    ) -> list[tuple[list[int], list[float]]]:
        """Return each prompt's greedy tokens at its own λ, in one batch, with their log-probabilities."""
        self._pipe.send((prompts, lams, tokens))
        found: list[tuple[list[int], list[float]]] = self._pipe.recv()
        return found


def _run(
    pipe: Any, folder: str, compiled: bool, clock: str, longest: int, options: dict[str, Any]
) -> None:
    from vllm import LLM

    try:
        llm = LLM(
            folder,
            dtype="bfloat16",
            enforce_eager=not compiled,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=longest + 256,
            max_num_batched_tokens=longest + 256,
            max_num_seqs=32,
            **options,
        )
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise
    config = llm.llm_engine.vllm_config
    graphs = config.compilation_config.cudagraph_mode
    pipe.send(
        {
            "runner": "V2" if config.use_v2_model_runner else "V1",
            "cuda_graphs": getattr(graphs, "name", str(graphs)),
        }
    )
    with contextlib.suppress(EOFError):  # whoever asked is done
        while True:
            asked = pipe.recv()
            if len(asked) == 3:
                pipe.send(_answer(llm, *asked))
            else:
                pipe.send(_generate(llm, CLOCKS[clock], *asked))


def _answer(
    llm: Any, prompts: list[list[int]], lams: list[float], tokens: int
) -> list[tuple[list[int], list[float]]]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            extra_args={"lambda": lam},
        )
        for lam in lams
    ]
    asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    found = [one.outputs[0] for one in llm.generate(asked, params, use_tqdm=False)]
    return [
        (
            list(one.token_ids),
            [step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)],
        )
        for one in found
    ]


def _generate(
    llm: Any, clock: Callable[[], float], rows: int, length: int, tokens: int, seed: int
) -> float:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    draw = random.Random(seed)
    prompts = [
        TokensPrompt(prompt_token_ids=[draw.randrange(49152) for _ in range(length)])
        for _ in range(rows)
    ]
    params = SamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args={"lambda": LAMBDA},
    )
    began = clock()
    llm.generate(prompts, params, use_tqdm=False)
    return clock() - began


def seconds(engine: Engine, row: str, new_tokens: int, seed: int) -> float:
    """Time one row once."""
    kind, size = row.split(":")
    if kind == "prefill":
        return engine.seconds(1, int(size), 1, seed)
    first = engine.seconds(int(size), PROMPT, 1, seed)
    return engine.seconds(int(size), PROMPT, 1 + new_tokens, seed) - first


def measure(engines: dict[str, Engine], row: str, rounds: int, new_tokens: int) -> dict[str, Any]:
    """Time a row on both engines, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name in sorted(engines, reverse=turn % 2 == 0):
            times[name].append(seconds(engines[name], row, new_tokens, turn))
    times = {name: found[1:] for name, found in times.items()}
    kind, size = row.split(":")
    done = int(size) * (new_tokens if kind == "decode" else 1)
    found: dict[str, Any] = {"row": row, "rounds": rounds, "dials": {}}
    found["tokens_per_second"] = {name: done / statistics.median(t) for name, t in times.items()}
    for name in times.keys() - {"plain"}:
        pairs = zip(times["plain"], times[name], strict=True)
        ratios = [plain / dial for plain, dial in pairs]
        found["dials"][name] = {
            "ratio": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
    return found
