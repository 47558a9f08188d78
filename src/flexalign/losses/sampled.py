"""The policy gradient whose reward is that of the sampled token: distillation on samples, cheapest form.

Let s be the student, t the teacher and y the token that the student sampled at a position. The
reward of the token is ``log t(y) − log s(y)``, a constant in the gradient, and the loss has the
gradient

    (log s(y) − log t(y))·∇log s(y).

A token is credited with its own reward only: the discount is 0. There is no baseline, and the
reward is neither clipped nor normalised. Its mean over y is the gradient of the position's
KL(s ‖ t), because Σ_v ∇s(v) = 0; so it has the aim of the divergence at every token, with the
variance of one sample in place of the exact expectation. (Yang et al. 2026, arXiv 2602.12125, in
which the teacher's logarithm is (1−λ)·log π_reference + λ·log π_aligned, not normalised. The
normaliser is the same for all tokens of a position, so it changes the variance, but not the mean.)
"""

from torch import Tensor

from flexalign.losses.sequence import Score


def token_score(log_s: Tensor, log_t: Tensor, tokens: Tensor) -> Score:
    """Weight every sampled token by the negative of its own reward, in nats.

    Args:
        log_s: The student's log-probabilities, shape ``(C, V)``.
        log_t: The teacher's, shape ``(C, V)``.
        tokens: The sampled token of each position, shape ``(C,)``.
    """
    chosen = tokens[:, None]
    return Score(tokens, (log_s.gather(1, chosen) - log_t.gather(1, chosen)).squeeze(1))
