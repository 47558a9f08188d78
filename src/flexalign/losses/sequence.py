"""What a sampled token owes to the rest of its response: the reverse KL of whole sequences.

Let π be the student and m(v) = π_reference(v)^(1−λ)·π_aligned(v)^λ, not normalised. Over whole
responses, ``KL(π ‖ Π m / Z)`` is least at the optimum that equation 5 approximates token by token,
and it is ``log Z + E_π Σ_t c_t`` with the cost of a position, given what came before it,

    c_t = Σ_v π(v)·(log π(v) − log m(v)).

Its gradient is ``E_π Σ_t [∇c_t + ∇log π(y_t)·Σ_{s>t} c_s]``. The first part is that of the token's
own reverse KL to equation 5, because the two differ by log Σ m, in which there is no student. The
second is all that the sequence adds: an early token is worth what it leads to. It is the policy
gradient, with the expectation over a position's own token taken exactly, here and in every c.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flexalign.heads import Head
from flexalign.losses.teacher import LOG_ZERO, FusedTeacher, write_logits


@dataclass(frozen=True)
class Score:
    """A gradient ``Σ weight·∇log π(token)`` to be added to a divergence's.

    Attributes:
        tokens: What was sampled at each counted position, shape ``(P,)``.
        weights: Nats, shape ``(P,)``.
    """

    tokens: Tensor
    weights: Tensor

    def add_to(self, gradient: Tensor, probabilities: Tensor, chunk: slice) -> None:
        """Add a chunk's part to its gradient by the student's logits; both are (C, V)."""
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
    """Weigh every sampled token by what the rest of its response costs.

    From a token's weight goes the mean weight of the other responses at the same place, counted
    in response tokens: it does not depend on the token, so the gradient keeps its mean, and its
    variance falls. A response without another one of its length keeps its weight.

    Args:
        hidden: The student's final hidden states, shape ``(B·T, H)``.
        student: Its head, cut from the graph.
        teacher: The fused teacher at the same positions.
        mask: Shape ``(B, T)``; True where a prediction counts.
        tokens: Shape ``(B, T)``: the tokens that the student drew there.
        chunk_size: Positions whose logits exist at one time.
    """
    mask = mask.bool()
    rows, columns = mask.nonzero(as_tuple=True)
    places = mask.cumsum(1)[rows, columns] - 1
    with torch.no_grad():
        costs = _costs(hidden, student, teacher, rows * mask.shape[1] + columns, chunk_size)

    # What comes after each token, one row per response and one column per place in it.
    by_place = costs.new_zeros(len(mask), int(places.max()) + 1 if len(places) else 0)
    by_place[rows, places] = costs
    ahead = by_place.flip(1).cumsum(1).flip(1) - by_place

    there = torch.zeros_like(by_place)
    there[rows, places] = 1
    others = there.sum(0) - there
    mean_of_others = ((ahead * there).sum(0) - ahead * there) / others.clamp(min=1)
    weights = (ahead - mean_of_others)[rows, places]
    return Score(tokens[rows, columns], weights)


def _costs(
    hidden: Tensor, student: Head, teacher: FusedTeacher, positions: Tensor, chunk_size: int
) -> Tensor:
    """c of the module's docstring at every counted position, nats: shape (P,)."""
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
