"""Baking: a plain model that behaves as the dial at one λ, by TrRa from the two streams."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from flexalign.inra.model import InRaModel
from flexalign.inra.training.recipe import BakeRecipe
from flexalign.inra.training.run import Run
from flexalign.inra.training.student import adapter_off, as_student
from flexalign.loading import load_model
from flexalign.trra.assembly import Parts
from flexalign.trra.forward import HeadForm
from flexalign.trra.parts import running_dtype
from flexalign.trra.teachers import Teacher
from flexalign.trra.trainer import TrRaTrainer

__all__ = ["Baking"]

_SPLIT_SEED = 0


class Baking(Run):
    """The baking of one setting; see :class:`~flexalign.inra.training.run.Run`.

    The student starts at the base. Its teachers are the two streams of one InRa model, so base
    and student are in memory and nothing else.
    """

    recipe: BakeRecipe

    @contextmanager
    def _trainer(self, callbacks: list[TrainerCallback]) -> Iterator[Any]:
        recipe = self.recipe
        dtype = running_dtype(self.arguments)
        inra = InRaModel.from_pretrained(recipe.base, recipe.adapter, dtype=dtype)
        inra.requires_grad_(False)
        student = load_model(recipe.base, dtype=torch.float32).requires_grad_(True)
        form = HeadForm.of(inra.base, inra.head.vocab_size)
        off = partial(adapter_off, inra.entry)
        split = self.data.train_test_split(test_size=recipe.held_out, seed=_SPLIT_SEED)
        with as_student(inra) as dial:
            parts = Parts(
                student=student,
                form=form,
                reference=Teacher(dial, None, form, shares_student=False, switch=off),
                aligned=Teacher(dial, None, form, shares_student=False),
                tokenizer=self.tokenizer,
            )
            yield TrRaTrainer(
                parts=parts,
                args=self.arguments,
                train_dataset=split["train"],
                eval_dataset=split["test"],
                processing_class=self.tokenizer,
                callbacks=callbacks,
            )

    def _measure(self, trainer: Any) -> dict[str, float]:
        """Measure the divergence to the dial on rows that were not trained on, nats per token."""
        before = [row for row in trainer.state.log_history if "eval_divergence" in row]
        after = trainer.evaluate()
        return super()._measure(trainer) | {
            "held_out_divergence": float(after["eval_loss"]),
            "held_out_divergence_of_base": float(before[0]["eval_divergence"]),
        }
