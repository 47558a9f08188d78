"""Rows that join and leave a batch: each of their logits is what it would be alone."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.subjects import make_base, stir
from flexalign.data.prompting import PromptSettings
from flexalign.generation import TwoModelDecoder, TwoPromptDecoder
from flexalign.generation.row_lambdas import RowDials
from flexalign.inra import InRaModel
from flexalign.models.pair import ModelPair
from flexalign.models.prompted import PairRendering, PromptPair
from flexalign.serving.engine import InRaRunner, PairRunner, PlainRunner, Runner, TwoPromptRunner
from flexalign.serving.engine.batch import Batch
from twin import fuse64

WINDOWED = ("mistral", "gemma2", "gpt_oss")
FAMILIES = ("qwen2", "olmo2", *WINDOWED)
JOINING = {0: [(7, 0.0), (3, 1.0)], 2: [(12, 0.3)], 5: [(1, 2.0), (5, -0.5)], 8: [(6, 1.0)]}
"""By step: the rows that join, (tokens of the prompt, λ); some are longer than all before."""
LEAVING = {4: 0, 6: 1, 7: 0}
"""By step: the place of the row that leaves; at 6 it is the longest, and its padding goes too."""


@dataclass
class TwoPromptLine:
    """A row under two prompts that writes whatever is likeliest."""

    prompts: tuple[list[int], list[int]]
    fixed: float
    written: list[int] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)

    @property
    def next_token(self) -> int | tuple[int, ...]:
        return self.written[-1] if self.written else tuple(one[-1] for one in self.prompts)

    def lam(self) -> float:
        return self.fixed


@dataclass
class Line:
    """A row that writes whatever is likeliest."""

    tokens: list[int]
    fixed: float
    seen: list[Tensor] = field(default_factory=list)

    @property
    def next_token(self) -> int:
        return self.tokens[-1]

    def lam(self) -> float:
        return self.fixed


def join(batch: Batch[Line], runner: Runner, lines: list[Line]) -> None:
    width = max(2, *(len(line.tokens) for line in lines)) - 1
    ids = torch.zeros((len(lines), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, line in enumerate(lines):
        earlier = line.tokens[:-1]
        if earlier:
            ids[place, -len(earlier) :] = torch.tensor(earlier)
            mask[place, -len(earlier) :] = 1
    rows = torch.arange(len(lines))
    dials = RowDials.of([line.fixed for line in lines], len(lines))
    cache = runner.prefill(ids, mask, [(rows, dials)])
    batch.add(lines, runner.fork(cache, rows, dials), mask)


@torch.inference_mode()
def drive(runner: Runner) -> list[tuple[Line, int]]:
    """Return every row and the length of its prompt."""
    generator = torch.Generator().manual_seed(0)
    batch: Batch[Line] = Batch(runner)
    everybody = []
    for step in range(12):
        if step in LEAVING:
            batch.keep([p for p in range(len(batch.sequences)) if p != LEAVING[step]])
        lines = [
            Line(torch.randint(3, 97, (length,), generator=generator).tolist(), lam)
            for length, lam in JOINING.get(step, ())
        ]
        if lines:
            join(batch, runner, lines)
            everybody += [(line, len(line.tokens)) for line in lines]
        logits = batch.step()
        for line, row in zip(batch.sequences, logits, strict=True):
            line.seen.append(row)
            line.tokens.append(int(row.argmax()))
    assert len(batch.sequences) == 3
    return everybody


def check(everybody: list[tuple[Line, int]], alone: Any) -> None:
    assert [len(line.seen) for line, _ in everybody] == [4, 7, 4, 7, 7, 4]
    for line, prompt in everybody:
        for step, row in enumerate(line.seen):
            expected = alone(torch.tensor([line.tokens[: prompt + step]]), line.fixed)
            torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_streams(family: str):
    model = InRaModel.create(make_base(family))
    stir(model.adapter, 0.05, seed=2)
    model.inra_config = replace(model.inra_config, lambda_range=(-1.0, 2.0))

    @torch.no_grad()
    def alone(tokens: Tensor, lam: float) -> Tensor:
        base, adapter = (model(tokens, lam=end).logits[0, -1].double() for end in (0.0, 1.0))
        return fuse64(base, adapter, lam)

    check(drive(InRaRunner(model)), alone)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_two_prompts(family: str, hybrid_tokenizer: Any):
    """Either prompt may be the longer one, and a row that leaves may be the longest by one alone."""
    base = make_base(family)
    prompts = PromptPair(aligned=PromptSettings(system="check"))
    runner = TwoPromptRunner(TwoPromptDecoder(base, PairRendering(hybrid_tokenizer, prompts)))
    joining = {
        0: [(7, 2, 0.0), (3, 9, 1.0)],
        2: [(2, 13, 0.3)],
        5: [(1, 1, 2.0), (9, 1, -0.5)],
        8: [(1, 6, 1.0)],
    }

    generator = torch.Generator().manual_seed(0)
    batch: Batch[TwoPromptLine] = Batch(runner)
    everybody: list[TwoPromptLine] = []
    for step in range(12):
        if step in LEAVING:
            batch.keep([p for p in range(len(batch.sequences)) if p != LEAVING[step]])
        for *lengths, lam in joining.get(step, ()):
            first, second = (
                torch.randint(3, 97, (int(n),), generator=generator).tolist() for n in lengths
            )
            line = TwoPromptLine((first, second), lam)
            width = max(2, len(first), len(second)) - 1
            ids, mask = torch.zeros((2, 1, 2, width), dtype=torch.long)
            for side, prompt in enumerate(line.prompts):
                if len(prompt) > 1:
                    ids[0, side, 1 - len(prompt) :] = torch.tensor(prompt[:-1])
                    mask[0, side, 1 - len(prompt) :] = 1
            rows, dials = torch.arange(1), RowDials.of(lam, 1)
            cache = runner.prefill(ids, mask, [(rows, dials)])
            batch.add([line], runner.fork(cache, rows, dials), mask)
            everybody.append(line)
        for line, row in zip(batch.sequences, batch.step(), strict=True):
            line.seen.append(row)
            line.written.append(int(row.argmax()))

    assert [len(line.seen) for line in everybody] == [4, 7, 4, 7, 7, 4]
    for line in everybody:
        for step, row in enumerate(line.seen):
            sides = [
                base(torch.tensor([prompt + line.written[:step]])).logits[0, -1].double()
                for prompt in line.prompts
            ]
            expected = fuse64(*sides, line.fixed)
            torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_pair(family: str, tiny_tokenizer: Any):
    models = [make_base(family, seed=seed, vocab_size=len(tiny_tokenizer)) for seed in (0, 1)]
    decoder = TwoModelDecoder(ModelPair.of(*models, tiny_tokenizer))

    @torch.no_grad()
    def alone(tokens: Tensor, lam: float) -> Tensor:
        reference, aligned = (model(tokens).logits[0, -1].double() for model in models)
        return fuse64(reference, aligned, lam)

    check(drive(PairRunner(decoder)), alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model(family: str):
    model = make_base(family)

    @torch.no_grad()
    def alone(tokens: Tensor, lam: float) -> Tensor:
        return model(tokens).logits[0, -1].double()

    check(drive(PlainRunner(model)), alone)
