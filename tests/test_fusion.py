"""Equation 5: exact at both ends, never NaN, and equal to its five-line twin in float64."""

import math
from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexalign.errors import ConfigError, LambdaError, PairMismatchError
from flexalign.fusion import (
    as_lambda,
    concatenate_hidden,
    fuse,
    fuse_hidden,
    fuse_logits,
    gated_lambda,
    per_position,
    total_variation,
)
from twin import fuse64

INF = math.inf

lambdas = st.floats(-20, 20, allow_nan=False)
finite_logits = st.floats(-60, 60, width=32)
any_logits = st.one_of(
    finite_logits,
    st.sampled_from([INF, -INF, torch.finfo(torch.float32).min, torch.finfo(torch.float32).max]),
)


def rows(logits: st.SearchStrategy[float], width: int = 5) -> st.SearchStrategy[torch.Tensor]:
    return st.lists(logits, min_size=width, max_size=width).map(torch.tensor)


def random_pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(4 * torch.randn(2, *shape, generator=generator))


@given(rows(any_logits), rows(any_logits))
def test_both_ends_are_exact(reference: torch.Tensor, aligned: torch.Tensor) -> None:
    assert torch.equal(fuse(reference, aligned, 0.0), reference)
    assert torch.equal(fuse(reference, aligned, 1.0), aligned)
    pair = fuse(
        torch.stack([reference, reference]), torch.stack([aligned] * 2), torch.tensor([0, 1])
    )
    assert torch.equal(pair, torch.stack([reference, aligned]))


@given(rows(any_logits), rows(any_logits), st.floats(-1e30, 1e30))
def test_no_logit_or_lambda_makes_nan(
    reference: torch.Tensor, aligned: torch.Tensor, lam: float
) -> None:
    fused = fuse(reference, aligned, lam)
    assert not fused.isnan().any()
    if numpy.float32(lam) not in (0, 1):
        assert not (fused == INF).any()


@given(rows(any_logits), rows(any_logits), lambdas)
def test_a_token_that_either_side_masks_is_masked(
    reference: torch.Tensor, aligned: torch.Tensor, lam: float
) -> None:
    if numpy.float32(lam) in (0, 1):
        return
    fused = fuse(reference, aligned, lam)
    masked = (reference < -1e38) | (aligned < -1e38)
    assert torch.equal(fused == -INF, masked)


@given(rows(finite_logits), rows(finite_logits), lambdas)
def test_equals_the_twin(reference: torch.Tensor, aligned: torch.Tensor, lam: float) -> None:
    expected = fuse64(reference, aligned, lam)
    size = float(reference.abs().max() + aligned.abs().max()) * (1 + abs(lam))
    assert (fuse(reference, aligned, lam) - expected).abs().max() <= 1e-6 * size


@given(rows(finite_logits), rows(finite_logits), lambdas, finite_logits, finite_logits)
def test_a_constant_added_to_one_side_changes_no_probability(
    reference: torch.Tensor, aligned: torch.Tensor, lam: float, one: float, other: float
) -> None:
    plain = fuse(reference.double(), aligned.double(), lam).softmax(-1)
    shifted = fuse(reference.double() + one, aligned.double() + other, lam).softmax(-1)
    torch.testing.assert_close(plain, shifted, rtol=0, atol=1e-10)


@given(rows(finite_logits), lambdas)
def test_a_model_fused_with_itself_is_itself(logits: torch.Tensor, lam: float) -> None:
    torch.testing.assert_close(fuse(logits, logits, lam), logits, rtol=0, atol=0)


@pytest.mark.parametrize("lam", [-1.0, 0.3, 2.0])
def test_padded_vocabulary_rows_have_probability_zero(lam: float) -> None:
    reference, aligned = random_pair(3, 7)
    reference[:, 5:] = -INF
    aligned[:, 5:] = torch.finfo(aligned.dtype).min
    assert (fuse(reference, aligned, lam).softmax(-1)[:, 5:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_minimum_of_each_dtype_counts_as_masked(dtype: torch.dtype) -> None:
    reference = torch.tensor([0.0, torch.finfo(dtype).min], dtype=dtype)
    aligned = torch.tensor([0.0, 3.0], dtype=dtype)
    assert fuse(reference, aligned, 2.0).tolist() == [0.0, -INF]
    assert fuse(aligned, reference, 1e-3).tolist() == [0.0, -INF]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_the_minimum_of_each_side_s_own_dtype_is_where_masking_begins(
    dtype: torch.dtype,
) -> None:
    edge = 0.5 * torch.finfo(dtype).min
    reference = torch.tensor([0.0, edge, 0.9 * edge], dtype=dtype)
    for other in (dtype, torch.float32):
        aligned = torch.tensor([0.0, 3.0, 3.0], dtype=other)
        for fused in (fuse(reference, aligned, 1e-3), fuse(aligned, reference, 1e-3)):
            assert (fused == -INF).tolist() == [False, True, False]


@pytest.mark.parametrize("lam", [1e36, -1e36, torch.finfo(torch.float32).max])
def test_an_enormous_lambda_leaves_what_is_not_masked_finite(lam: float) -> None:
    assert fuse(torch.tensor([0.0, 1e5]), torch.tensor([1e5, 0.0]), lam).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_mixed_in_float32(dtype: torch.dtype) -> None:
    reference, aligned = (side.to(dtype) for side in random_pair(4, 9))
    fused = fuse(reference, aligned, 3.0)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(
        fused.double(), fuse64(reference.double(), aligned.double(), 3.0), rtol=1e-6, atol=1e-5
    )


def test_float64_stays_float64() -> None:
    reference, aligned = (side.double() for side in random_pair(2, 3))
    assert fuse(reference, aligned.float(), 0.5).dtype == torch.float64


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (1, 3), (2, 1), (1,)])
def test_lambda_broadcasts_from_the_left(shape: tuple[int, ...]) -> None:
    reference, aligned = random_pair(2, 3, 5)
    lam = torch.linspace(-1, 3, math.prod(shape)).reshape(shape)
    fused = fuse(reference, aligned, lam)
    whole = lam.reshape(shape + (1,) * (2 - lam.ndim)).expand(2, 3)
    for row in range(2):
        for position in range(3):
            expected = fuse64(
                reference[row, position], aligned[row, position], float(whole[row, position])
            )
            torch.testing.assert_close(
                fused[row, position].double(), expected, rtol=1e-5, atol=1e-5
            )
    spread = per_position(lam, reference)
    assert torch.equal(spread, whole.reshape(-1))


@pytest.mark.parametrize(
    "lam",
    [
        math.nan,
        INF,
        -INF,
        10**400,
        1e39,
        2j,
        "2",
        None,
        True,
        [0.5],
        torch.tensor(math.nan),
        torch.tensor([0.0, INF]),
        torch.tensor([True]),
        torch.tensor(1j),
    ],
    ids=repr,
)
def test_what_is_no_finite_real_lambda_is_refused(lam: object) -> None:
    reference, aligned = random_pair(2, 5)
    with pytest.raises(LambdaError, match="λ must be"):
        fuse(reference, aligned, lam)  # type: ignore[arg-type]


def test_a_tensor_with_something_that_is_not_finite_is_refused_for_that() -> None:
    for value in (math.nan, INF, -INF):
        with pytest.raises(
            LambdaError, match=r"^λ must be finite, got a tensor with NaN or infinity in it\.$"
        ):
            as_lambda(torch.tensor([0.5, value]))


@pytest.mark.parametrize("shape", [(3,), (2, 2), (2, 3, 1), (2, 3, 5), (0,)])
def test_a_lambda_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    reference, aligned = random_pair(2, 3, 5)
    with pytest.raises(LambdaError, match="one per row"):
        fuse(reference, aligned, torch.ones(shape))


@pytest.mark.parametrize(
    "lam", [2, numpy.float32(2), numpy.int64(2), Fraction(2), torch.tensor(2), torch.tensor(2.0)]
)
def test_every_real_two_is_two(lam: object) -> None:
    assert float(as_lambda(lam)) == 2.0


def test_a_tensor_of_lambdas_stays_as_it_is_and_becomes_float32_where_it_is_whole() -> None:
    exact = torch.tensor([0.1, 2.0], dtype=torch.float64)
    assert as_lambda(exact) is exact
    whole = as_lambda(torch.tensor([0, 2]))
    assert isinstance(whole, torch.Tensor)
    assert whole.dtype == torch.float32


def test_two_widths_are_refused_with_the_remedy() -> None:
    with pytest.raises(PairMismatchError, match="cut padded vocabularies"):
        fuse(torch.zeros(2, 5), torch.zeros(2, 6), 0.5)


@given(rows(finite_logits), rows(finite_logits), lambdas, st.floats(0, 1))
def test_the_gate_equals_the_twin(
    reference: torch.Tensor, aligned: torch.Tensor, lam: float, gate: float
) -> None:
    reference, aligned = reference.double(), aligned.double()
    distance = 0.5 * (reference.softmax(-1) - aligned.softmax(-1)).abs().sum()
    if abs(distance - gate) < 1e-9:
        return
    torch.testing.assert_close(
        fuse(reference, aligned, lam, gate), fuse64(reference, aligned, lam, gate)
    )


def test_the_gate_lets_lambda_through_only_where_the_models_differ() -> None:
    reference = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    aligned = torch.tensor([[[0.1, 0.0], [9.0, 0.0]], [[0.1, 0.0], [9.0, 0.0]]])
    assert gated_lambda(reference, aligned, 5.0, 0.2).tolist() == [[1, 5], [1, 5]]
    assert gated_lambda(reference, aligned, torch.tensor([-2.0, 0.5]), 0.2).tolist() == [
        [0, -2],
        [0.5, 0.5],
    ]
    assert gated_lambda(reference, aligned, 1.5, 0.2).tolist() == [[1, 1.5], [1, 1.5]]
    assert gated_lambda(reference, aligned, torch.tensor([1.5, 0.5]), 0.2).tolist() == [
        [1, 1.5],
        [0.5, 0.5],
    ]


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0, torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])])
def test_the_gate_hands_a_lambda_back_of_which_nothing_lies_outside(
    lam: float | torch.Tensor,
) -> None:
    assert gated_lambda(*random_pair(2, 5), lam, 0.2) is lam


def test_models_that_are_one_do_not_pass_a_gate_of_zero() -> None:
    logits, _ = random_pair(3, 5)
    assert gated_lambda(logits, logits, 3.0, 0.0).tolist() == [1, 1, 1]


def test_the_gate_and_the_distance_are_in_float32_for_half_precision() -> None:
    reference, aligned = (side.bfloat16() for side in random_pair(6, 5))
    distance = total_variation(reference, aligned)
    exact = 0.5 * (reference.double().softmax(-1) - aligned.double().softmax(-1)).abs().sum(-1)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), exact, rtol=0, atol=1e-6)
    passed = gated_lambda(reference, aligned, 2.3, 0.0)
    assert passed.dtype == torch.float32
    assert torch.equal(passed, torch.full((6,), 2.3))


def test_a_gate_of_one_is_never_passed_and_one_of_zero_by_any_difference() -> None:
    reference, aligned = random_pair(4, 6)
    assert torch.equal(fuse(reference, aligned, 3.0, gate=1.0), aligned)
    assert torch.equal(fuse(reference, aligned, 3.0, gate=0.0), fuse(reference, aligned, 3.0))


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, True, "0.1", torch.tensor(0.1)])
def test_a_gate_that_is_no_share_is_refused(value: object) -> None:
    reference, aligned = random_pair(2, 5)
    with pytest.raises(ConfigError, match=r"gate must be a number in \[0, 1\]"):
        fuse(reference, aligned, 2.0, value)  # type: ignore[arg-type]


def test_total_variation_of_known_distributions() -> None:
    one = torch.tensor([0.7, 0.2, 0.1]).log()
    other = torch.tensor([0.4, 0.2, 0.4]).log()
    assert float(total_variation(one, other)) == pytest.approx(0.3, abs=1e-6)
    assert float(total_variation(one, one)) == 0.0
    apart = torch.tensor([0.0, -INF]), torch.tensor([-INF, 0.0])
    assert float(total_variation(*apart)) == 1.0


@pytest.mark.parametrize(
    "lam",
    [0.0, 1.0, 2.5, torch.tensor([-1.0, 0.5]), torch.tensor([[-1.0, 0.5, 2.0], [0.0, 1.0, 3.0]])],
    ids=["reference", "aligned", "beyond", "by row", "by position"],
)
def test_one_product_of_joined_hidden_states_is_the_fused_logits(lam: float | torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    h_reference = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    h_aligned = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    w_reference = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    w_aligned = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    joined = (
        concatenate_hidden(h_reference, h_aligned, lam)
        @ torch.cat([w_reference, w_aligned], dim=1).mT
    )
    torch.testing.assert_close(
        joined, fuse64(h_reference @ w_reference.mT, h_aligned @ w_aligned.mT, lam)
    )


@pytest.mark.parametrize("lam", [0.5, torch.tensor([0.5, 2.0])], ids=["number", "tensor"])
def test_joined_hidden_states_keep_their_dtype(lam: float | torch.Tensor) -> None:
    one, other = (side.bfloat16() for side in random_pair(2, 4))
    assert concatenate_hidden(one, other, lam).dtype == torch.bfloat16
    assert concatenate_hidden(one, other.float(), lam).dtype == torch.float32


def test_gradients_reach_both_sides_in_their_shares() -> None:
    reference, aligned = (side.requires_grad_() for side in random_pair(2, 3))
    fuse(reference, aligned, 2.5).sum().backward()
    assert torch.equal(reference.grad, torch.full_like(reference, -1.5))
    assert torch.equal(aligned.grad, torch.full_like(aligned, 2.5))


def test_an_empty_batch_stays_empty() -> None:
    assert fuse(torch.zeros(0, 5), torch.zeros(0, 5), 2.0).shape == (0, 5)
    assert fuse(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0)).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_hidden_states_give_the_fused_logits_of_one_linear_head(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    reference, aligned = torch.randn(2, 6, 16, generator=generator).to(dtype)
    lam = torch.tensor([0.0, 1.0, 0.5, 2.0, -0.5, 30.0])
    mixed = fuse_hidden(reference, aligned, lam)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed[0], reference[0].float())
    assert torch.equal(mixed[1], aligned[1].float())
    assert torch.equal(mixed, fuse(reference, aligned, lam))
    head = torch.randn(9, 16, generator=generator, dtype=torch.float64)
    expected = fuse64(reference.double() @ head.T, aligned.double() @ head.T, lam)
    unit = torch.finfo(torch.float32).eps * expected.abs().max()
    torch.testing.assert_close(mixed.double() @ head.T, expected, atol=float(4 * unit), rtol=0)


def test_hidden_states_are_fused_with_one_lambda_for_each_position() -> None:
    reference, aligned = random_pair(2, 3, 4)
    lam = torch.tensor([[0.0, 1.0, 0.5], [2.0, -0.5, 30.0]], dtype=torch.float64)
    expected = fuse64(reference, aligned, lam)
    mixed = fuse_hidden(reference, aligned, lam)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("lam", [0.0, 1.0, 0.3, 2.0, -0.5])
def test_one_lambda_for_all_hidden_states_is_the_same_for_each(
    lam: float, dtype: torch.dtype
) -> None:
    reference, aligned = (side.to(dtype) for side in random_pair(2, 3, 4))
    mixed = fuse_hidden(reference, aligned, lam)
    assert mixed.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(mixed, fuse(reference, aligned, lam))
    rows = torch.full((2,), lam, dtype=torch.float64)
    assert torch.equal(mixed, fuse_hidden(reference, aligned, rows))


def test_at_an_end_of_lambda_the_other_hidden_states_are_not_read() -> None:
    reference, aligned = random_pair(2, 3)
    assert torch.equal(fuse_hidden(reference, aligned * math.nan, 0.0), reference)
    assert torch.equal(fuse_hidden(reference * math.nan, aligned, 1.0), aligned)


def test_what_fuses_inside_does_not_check_lambda_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(lam: object) -> float:
        raise AssertionError(f"λ = {lam} was checked again")

    reference, aligned = random_pair(2, 3)
    expected = fuse(reference, aligned, 2.0)
    monkeypatch.setattr("flexalign.fusion.as_lambda", refuse)
    assert torch.equal(fuse_logits(reference, aligned, 2.0), expected)
    assert torch.equal(fuse_logits(reference, aligned, 2.0, gate=0.0), expected)
    assert torch.equal(fuse_hidden(reference, aligned, 2.0), expected)
    concatenate_hidden(reference, aligned, 2.0)
    with pytest.raises(AssertionError, match="checked again"):
        fuse(reference, aligned, 2.0)
