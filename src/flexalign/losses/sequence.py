"""The reverse KL of whole responses: the additional gradient of sampled tokens.

Let π be the student and m(v) = π_reference(v)^(1−λ)·π_aligned(v)^λ, not normalised. Over whole
responses, ``KL(π ‖ Π m / Z)`` is least at the optimum that equation 5 approximates token by token,
and it is ``log Z + E_π Σ_t c_t`` with the cost of a position, given what came before it,

    c_t = Σ_v π(v)·(log π(v) − log m(v)).

Its gradient is ``E_π Σ_t [∇c_t + ∇log π(y_t)·Σ_{s>t} c_s]``. The first term is the gradient of the
token's reverse KL to equation 5, because the two differ by log Σ m, which does not depend on the
student. The second term, which this module adds, weights each token by the cost of the positions
after it. It is the policy gradient, with an exact expectation over each position's own token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flexalign.heads import Head
from flexalign.losses.teacher import LOG_ZERO, FusedTeacher, write_logits


@dataclass(frozen=True)
class Score:
    """The gradient ``Σ weight·∇log π(token)``, which is added to that of a divergence.

    Attributes:
        tokens: The sampled token of each counted position, shape ``(P,)``.
        weights: Its weight, in nats, shape ``(P,)``.
    """

    tokens: Tensor
    weights: Tensor

    def add_to(self, gradient: Tensor, probabilities: Tensor, chunk: slice) -> None:
        """Add a chunk's part to a gradient with respect to the student's logits, in place.

        Args:
            gradient: The chunk's gradient, (C, V).
            probabilities: The student's probabilities, (C, V).
            chunk: The chunk's positions among the counted ones.
        """
        tokens, weights = self.tokens[chunk, None], self.weights[chunk, None].to(gradient.dtype)
        gradient.addcmul_(probabilities, weights, value=-1)
        gradient.scatter_add_(1, tokens, weights)


def sampled_score(
    hidden: Tensor,
    student: Head,
    teacher: FusedTeacher,
    mask: Tensor,
    tokens: Tensor,
    chunk_size: int,
) -> Score:
    """Weight every sampled token by the cost of the rest of its response.

    A baseline is subtracted from each weight: the mean weight of the other responses at the same
    place, counted in response tokens. It does not depend on the token, so it does not change the
    mean of the gradient, but it reduces the variance. If no other response is as long, nothing is
    subtracted.

    Args:
        hidden: The student's final hidden states, shape ``(B·T, H)``.
        student: Its head, detached from the graph.
        teacher: The fused teacher at the same positions.
        mask: Shape ``(B, T)``; True where a prediction counts.
        tokens: Shape ``(B, T)``: the tokens that the student sampled there.
        chunk_size: Positions whose logits exist at one time.
    """
    mask = mask.bool()
    rows, columns = mask.nonzero(as_tuple=True)
    places = mask.cumsum(1)[rows, columns] - 1
    with torch.no_grad():
        costs = _costs(hidden, student, teacher, rows * mask.shape[1] + columns, chunk_size)

    # The cost after each token: one row per response, and one column per place in it.
    by_place = costs.new_zeros(len(mask), int(places.max()) + 1 if len(places) else 0)
    by_place[rows, places] = costs
    ahead = by_place.flip(1).cumsum(1).flip(1) - by_place

    # The baseline: the mean over the other responses that have a token at this place.
    exists = torch.zeros_like(by_place)
    exists[rows, places] = 1
    others = exists.sum(0) - exists
    mean_of_others = ((ahead * exists).sum(0) - ahead * exists) / others.clamp(min=1)
    weights = (ahead - mean_of_others)[rows, places]
    return Score(tokens[rows, columns], weights)


def _costs(
    hidden: Tensor, student: Head, teacher: FusedTeacher, positions: Tensor, chunk_size: int
) -> Tensor:
    """Return the cost c (see the module's docstring) of every counted position, in nats, (P,)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    costs = hidden.new_empty(len(positions), dtype=dtype)
    for start in range(0, len(positions), chunk_size):
        chunk = slice(start, start + chunk_size)
        rows = positions[chunk]

        logits = hidden.new_empty((len(rows), student.vocab_size), dtype=dtype)
        write_logits(student, hidden[rows].to(dtype), logits)
        log_s = torch.log_softmax(logits, -1).clamp_(min=LOG_ZERO)

        log_m = teacher.log_weights(rows, dtype).clamp_(min=LOG_ZERO)
        costs[chunk] = (log_s.exp() * (log_s - log_m)).sum(-1)
    return costs
