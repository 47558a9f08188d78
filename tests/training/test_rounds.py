from pathlib import Path

import pytest

from flexalign.errors import ConfigError
from flexalign.training.run import effective_lambda, plan_rounds


def test_each_round_learns_from_the_one_before() -> None:
    rounds = plan_rounds("aligned", "out", 3)
    assert [(item.number, item.aligned, str(item.output)) for item in rounds] == [
        (1, "aligned", "out/round-1"),
        (2, "out/round-1", "out/round-2"),
        (3, "out/round-2", "out"),
    ]
    assert plan_rounds("aligned", "out", 1)[0].output == Path("out")


@pytest.mark.parametrize("lam", [0.5, 1.0, 1.5, -1.0])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_effective_lambda_is_what_repeated_fusion_gives(lam: float, rounds: int) -> None:
    reference, aligned = 0.3, 1.7
    result = aligned
    for _ in range(rounds):
        result = reference + lam * (result - reference)
    effective = effective_lambda(lam, rounds)
    assert reference + effective * (aligned - reference) == pytest.approx(result, rel=1e-12)


def test_a_schedule_counts_by_its_end() -> None:
    schedule = {"kind": "linear", "start": 0, "end": 1.5, "steps": 10}
    assert effective_lambda(schedule, 2) == 2.25


def test_several_rounds_beyond_four_want_permission() -> None:
    assert effective_lambda(2.0, 2) == 4.0
    assert effective_lambda(10.0, 1) == 10.0
    with pytest.raises(ConfigError, match=r"amount to λ=8.*--extrapolate"):
        effective_lambda(2.0, 3)
    with pytest.raises(ConfigError, match="amount to λ=-8"):
        effective_lambda(-2.0, 3)
    assert effective_lambda(2.0, 3, extrapolate=True) == 8.0
