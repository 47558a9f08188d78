"""The loss of one step, equation 6, computed inside the student's wrapped forward.

The teachers' hidden states come from the two models (:class:`Objective`) or from a cache
(:class:`CachedObjective`). If the sides have prompts of their own, the aligned teacher runs on the
same responses after its own prompt (:mod:`flexalign.training.pair_rows`), and its states are moved to
the student's positions. The KL to each model, which the log shows, needs the logits of both in
addition to the fused ones. Steps that are not logged do not compute them, so
:class:`~flexalign.losses.teacher.FusedTeacher` can use fewer products.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flexalign.fusion import Lambda
from flexalign.heads import Head, last_hidden
from flexalign.losses import (
    Divergence,
    DivergenceMetrics,
    SampledObjective,
    fused_divergence,
)
from flexalign.models.adapters import inner_model
from flexalign.models.pair import Heads, Side
from flexalign.training.forward import HeadForm, gathered_head, run_inside, run_with_head
from flexalign.training.hidden_cache.read import CACHED
from flexalign.training.models import Teacher
from flexalign.training.pair_rows import ALIGNED_PROMPT, under_aligned_prompt

Loss: TypeAlias = tuple[Tensor, DivergenceMetrics | None]
"""The loss, nats per response token, and the metrics over the same denominator, or None."""


@dataclass(frozen=True, kw_only=True)
class _Equation6:
    """The settings of the loss, for loaded and for cached teachers.

    Attributes:
        divergence: As in :func:`~flexalign.losses.fused_divergence`, as are the next three.
        beta: β of ``"jsd"``.
        gate: τ, or None.
        chunk_size: Tokens whose logits exist at one time.
        sampled_objective: The gradient for batches with sampled tokens.
    """

    divergence: Divergence
    beta: float
    gate: float | None
    chunk_size: int
    sampled_objective: SampledObjective = "sequence"

    def _loss(
        self,
        student: tuple[Tensor, Head],
        reference: tuple[Tensor, Head],
        aligned: tuple[Tensor, Head],
        mask: Tensor,
        lam: Lambda,
        num_items: Tensor | int,
        *,
        metrics: bool,
        sampled: Tensor | None = None,
    ) -> Loss:
        """Return the divergence between hidden states, each given with its head."""
        given: dict[str, Any] = {
            "divergence": self.divergence,
            "beta": self.beta,
            "gate": self.gate,
            "num_items": num_items,
            "chunk_size": self.chunk_size,
            "sampled": sampled,
            "sampled_objective": self.sampled_objective,
        }

        # The loss chooses the precision of its products itself.
        with torch.autocast(student[0].device.type, enabled=False):
            if metrics:
                return fused_divergence(
                    *student, *reference, *aligned, mask, lam, metrics=True, **given
                )
            return fused_divergence(*student, *reference, *aligned, mask, lam, **given), None


@dataclass(frozen=True)
class Objective(_Equation6):
    """The divergence between a student and the fused teacher, inside the student's forward.

    Attributes:
        student: The student without the trainer's wrappers: a transformers model, or a PEFT
            wrapper of one.
        form: The form of its head.
        reference: The teacher of λ=0.
        aligned: The teacher of λ=1.
        shares_head: Whether the teachers are two modules whose heads have equal values, as after
            the merge of a LoRA. The loss then needs one product with the head for both of them.
    """

    student: nn.Module
    form: HeadForm
    reference: Teacher
    aligned: Teacher
    shares_head: bool = False

    def __call__(
        self,
        wrapper: nn.Module,
        inputs: Mapping[str, Any],
        mask: Tensor,
        lam: Lambda,
        num_items: Tensor | int,
        metrics: bool = False,
        sampled: Tensor | None = None,
    ) -> Loss:
        """Run the models on one batch.

        Args:
            wrapper: The student as the trainer wrapped it (DDP, FSDP, …), or unwrapped.
            inputs: ``input_ids`` (B, T) and other inputs of the decoders, without labels. With
                `ALIGNED_PROMPT`, the aligned teacher runs after that prompt; the rows are then
                padded on the right.
            mask: Shape (B, T − 1); True where the token that follows position t is trained on.
            lam: λ of this step: a number, or one per row or position, shape (B,) or (B, T − 1).
            num_items: The denominator: response tokens of the whole step.
            metrics: Compute the KL to both models too.
            sampled: As in :func:`~flexalign.losses.fused_divergence`; None: the loss per token.
        """
        inner = inner_model(self.student)
        is_sequence = sampled is not None and self.sampled_objective == "sequence"
        teachers = self._needed(lam, metrics or is_sequence)
        hidden: dict[Side, Tensor] = {}
        heads: dict[Side, Head] = {}

        inputs = dict(inputs)
        prompts = inputs.pop(ALIGNED_PROMPT, None)
        own = (
            under_aligned_prompt(inputs["input_ids"], inputs["attention_mask"], mask, prompts)
            if prompts is not None and "aligned" in teachers
            else None
        )

        def run(side: Side, given: Mapping[str, Any]) -> Tensor:
            if own is None or side == "reference":
                return teachers[side].hidden(given)[:, :-1]
            return own.as_student(teachers[side].hidden(own.inputs))[:, :-1]

        def inside(**given: Any) -> Loss:
            for side, teacher in teachers.items():
                if teacher.shares_student:
                    hidden[side] = run(side, given)
            student_hidden = last_hidden(inner, **given)[:, :-1]
            return run_with_head(inner, self.form, student_hidden, loss)

        def loss(student_hidden: Tensor, head: Head) -> Loss:
            frozen = _detached(head)
            sides = {side: (hidden[side], heads.get(side, frozen)) for side in teachers}

            # A model with weight 0 did not run. Its states are not used, so the other's are passed.
            (one, *_) = sides.values()
            reference, aligned = sides.get("reference", one), sides.get("aligned", one)
            return self._loss(
                (student_hidden, head),
                reference,
                aligned,
                mask,
                lam,
                num_items,
                metrics=metrics,
                sampled=sampled,
            )

        # Teachers with a separate module run before the student's forward, the others inside it.
        with ExitStack() as gathering:
            for side, teacher in teachers.items():
                if not teacher.shares_student:
                    hidden[side] = run(side, inputs)
                    if self.shares_head and heads:
                        heads[side] = heads["reference"]
                        continue
                    heads[side] = gathering.enter_context(
                        gathered_head(teacher.model, teacher.form)
                    )
            return run_inside(wrapper, inner, inside, **inputs)

    def _needed(self, lam: Lambda, both: bool) -> dict[Side, Teacher]:
        """Return the teachers that must run: only one if λ is 0 or 1, unless `both` is set."""
        if not both and isinstance(lam, float) and lam in (0.0, 1.0):
            return {"reference": self.reference} if lam == 0.0 else {"aligned": self.aligned}
        return {"reference": self.reference, "aligned": self.aligned}


@dataclass(frozen=True)
class CachedObjective(_Equation6):
    """The same divergence, with the teachers' hidden states from a cache.

    Attributes:
        student: As in :class:`Objective`.
        form: The form of its head.
        heads: The teachers' heads.
    """

    student: nn.Module
    form: HeadForm
    heads: Heads

    def __call__(
        self,
        wrapper: nn.Module,
        inputs: Mapping[str, Any],
        mask: Tensor,
        lam: Lambda,
        num_items: Tensor | int,
        metrics: bool = False,
    ) -> Loss:
        """Run the student on one batch; see :meth:`Objective.__call__`.

        Args:
            wrapper: The student as the trainer wrapped it.
            inputs: A batch of :class:`~flexalign.training.hidden_cache.read.CachedCollator`,
                without labels.
            mask: Shape (B, T − 1). Its true positions are those of the cached states, in order.
            lam: As in :meth:`Objective.__call__`.
            num_items: The denominator.
            metrics: Compute the KL to both models too.
        """
        inner = inner_model(self.student)
        given = {
            name: value for name, value in inputs.items() if name not in (CACHED, ALIGNED_PROMPT)
        }
        reference, aligned = (
            (torch.cat(inputs[CACHED][side]), getattr(self.heads, side)) for side in Heads._fields
        )

        # Positions in (B, T) instead of (B, T − 1), so that the hidden states need no copy.
        positions = nn.functional.pad(mask, (0, 1)).flatten().nonzero().squeeze(-1)
        counted = torch.ones_like(positions, dtype=torch.bool)
        if isinstance(lam, Tensor):
            rows = lam[:, None] if lam.ndim == 1 else lam
            lam = rows.expand(mask.shape)[mask]

        def inside(**given: Any) -> Loss:
            hidden = last_hidden(inner, **given).flatten(0, 1).index_select(0, positions)
            return run_with_head(inner, self.form, hidden, loss)

        def loss(hidden: Tensor, head: Head) -> Loss:
            student = (hidden, head)
            return self._loss(student, reference, aligned, counted, lam, num_items, metrics=metrics)

        return run_inside(wrapper, inner, inside, **given)


def _detached(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return replace(head, weight=head.weight.detach(), bias=bias)
