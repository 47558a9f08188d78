"""One step's loss: three models, one wrapped forward, equation 6."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexalign.heads import Head, last_hidden
from flexalign.losses import Divergence, DivergenceMetrics, fused_divergence
from flexalign.pairing.adapters import inner_model
from flexalign.trra.forward import HeadForm, gathered_head, run_inside, run_with_head
from flexalign.trra.teachers import Teacher

__all__ = ["Objective"]


@dataclass(frozen=True)
class Objective:
    """The divergence between a student and the fused teacher, inside the student's forward.

    Attributes:
        student: The student, unwrapped: a transformers model, or a PEFT wrapper of one.
        form: The form of its head.
        reference: The teacher of λ=0.
        aligned: The teacher of λ=1.
        divergence: As in :func:`~flexalign.losses.fused_divergence`, like the next three.
        beta: β of ``"jsd"``.
        gate: τ, or None.
        chunk_size: Tokens whose logits exist at one time.
    """

    student: nn.Module
    form: HeadForm
    reference: Teacher
    aligned: Teacher
    divergence: Divergence
    beta: float
    gate: float | None
    chunk_size: int

    def __call__(
        self,
        wrapper: nn.Module,
        inputs: Mapping[str, Any],
        mask: Tensor,
        lam: float,
        num_items: Tensor | int,
    ) -> tuple[Tensor, DivergenceMetrics]:
        """Run the three models on one batch.

        Args:
            wrapper: The student as the trainer wrapped it (DDP, FSDP, …), or itself.
            inputs: ``input_ids`` (B, T) and what else the decoders take; no labels.
            mask: Shape (B, T − 1); True where the token that follows position t is trained on.
            lam: λ of this step.
            num_items: The denominator: response tokens of the whole step.

        Returns:
            The loss, nats per response token, and the metrics over the same denominator.
        """
        inner = inner_model(self.student)
        teachers = {"reference": self.reference, "aligned": self.aligned}
        hidden: dict[str, Tensor] = {}
        heads: dict[str, Head] = {}

        def inside(**given: Any) -> tuple[Tensor, DivergenceMetrics]:
            for side, teacher in teachers.items():
                if teacher.shares_student:
                    hidden[side] = teacher.hidden(given)[:, :-1]
            student_hidden = last_hidden(inner, **given)[:, :-1]
            return run_with_head(inner, self.form, student_hidden, loss)

        def loss(student_hidden: Tensor, head: Head) -> tuple[Tensor, DivergenceMetrics]:
            frozen = _detached(head)
            with torch.autocast(student_hidden.device.type, enabled=False):
                return fused_divergence(
                    student_hidden,
                    head,
                    hidden["reference"],
                    heads.get("reference", frozen),
                    hidden["aligned"],
                    heads.get("aligned", frozen),
                    mask,
                    lam,
                    divergence=self.divergence,
                    beta=self.beta,
                    gate=self.gate,
                    num_items=num_items,
                    chunk_size=self.chunk_size,
                    metrics=True,
                )

        with ExitStack() as gathering:
            for side, teacher in teachers.items():
                if not teacher.shares_student:
                    hidden[side] = teacher.hidden(inputs)[:, :-1]
                    heads[side] = gathering.enter_context(
                        gathered_head(teacher.model, teacher.form)
                    )
            return run_inside(wrapper, inner, inside, **inputs)


def _detached(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return replace(head, weight=head.weight.detach(), bias=bias)
