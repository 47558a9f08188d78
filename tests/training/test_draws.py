"""The λ of the rows of a step: spread over the range, and the same however the step is run."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from flexalign.lambdas import LambdaRange
from flexalign.training.draws import LAMBDAS, RowLambdas, draw_shares, spread_over_documents


@pytest.mark.parametrize("rows", [1, 2, 7, 24])
def test_every_step_has_one_row_in_each_part_of_the_range(rows: int) -> None:
    for step in range(50):
        shares = draw_shares(3, step, rows)
        assert sorted(int(share * rows) for share in shares) == list(range(rows))


def test_a_row_is_uniform_over_the_steps_and_does_not_keep_its_part() -> None:
    steps = np.array([draw_shares(0, step, 8) for step in range(2000)])
    for place in range(8):
        assert kstest(steps[:, place], "uniform").pvalue > 1e-4
    parts = (steps * 8).astype(int)
    assert abs(np.corrcoef(parts[:, 0], parts[:, 1])[0, 1] + 1 / 7) < 0.1  # without replacement


def test_the_draw_follows_from_seed_and_step_alone() -> None:
    assert draw_shares(1, 5, 6) == draw_shares(1, 5, 6)
    assert draw_shares(1, 5, 6) != draw_shares(1, 6, 6)
    assert draw_shares(1, 5, 6) != draw_shares(2, 5, 6)


def test_documents_of_a_row_are_spread_and_equal_within() -> None:
    lengths = [3, 1, 4, 2, 5, 3, 2, 4]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    spread = spread_over_documents(torch.tensor([0.3], dtype=torch.float64), positions)[0]
    documents = spread.split(lengths)
    assert all(bool((document == document[0]).all()) for document in documents)
    places = np.sort([float(document[0]) for document in documents])
    assert places.min() >= 0
    assert places.max() < 1
    assert float(documents[0][0]) == 0.3
    # Eight points of a golden-ratio sequence leave no gap of twice the mean, ends joined.
    assert np.diff([*places, places[0] + 1]).max() < 2 / 8


class _Trainer(RowLambdas):
    """The mix-in over a stand-in for TRL's trainer, which would load a model."""

    padding_free = False

    def __init__(self, process: int, processes: int, batch_size: int) -> None:
        self.args = SimpleNamespace(seed=4, schedule=LambdaRange(-1, 3))
        self.state = SimpleNamespace(global_step=17)
        self.accelerator = SimpleNamespace(num_processes=processes, process_index=process)
        self._train_batch_size = batch_size

    def lambdas(self, batches: list[dict[str, Any]]) -> list[list[float]]:
        self._give_lambdas(batches, self.args.schedule)
        return [batch[LAMBDAS].tolist() for batch in batches]


def _batches(count: int, rows: int) -> list[dict[str, Any]]:
    return [{"input_ids": torch.zeros(rows, 5, dtype=torch.long)} for _ in range(count)]


def test_the_same_rows_have_the_same_lambda_for_every_number_of_processes() -> None:
    alone = [lam for batch in _Trainer(0, 1, 12).lambdas(_batches(1, 12)) for lam in batch]
    assert min(alone) >= -1
    assert max(alone) < 3

    # Two processes of two batches of three: the data's batches go to them in turn.
    first, second = (_Trainer(process, 2, 3).lambdas(_batches(2, 3)) for process in (0, 1))
    assert [*first[0], *second[0], *first[1], *second[1]] == alone


def test_a_smaller_last_batch_keeps_the_places() -> None:
    whole = _Trainer(0, 1, 4).lambdas(_batches(2, 4))
    cut = _Trainer(0, 1, 4).lambdas([*_batches(1, 4), *_batches(1, 2)])
    assert cut == [whole[0], whole[1][:2]]


def test_a_packed_batch_has_one_lambda_for_each_document() -> None:
    trainer = _Trainer(0, 1, 3)
    trainer.padding_free = True
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    batch = {"input_ids": torch.zeros(1, 9, dtype=torch.long), "position_ids": positions}
    (lams,) = trainer.lambdas([batch])
    (first,) = draw_shares(4, 17, 1)
    golden = (5**0.5 - 1) / 2
    expected = [-1 + 4 * ((first + number * golden) % 1) for number in range(3)]
    assert lams[0] == pytest.approx([expected[0]] * 3 + [expected[1]] * 2 + [expected[2]] * 4)
