"""What a run is put together from, and what holds for every student."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from flexalign.errors import ConfigError, PairMismatchError
from flexalign.loading import Source, resolve
from flexalign.pairing.adapters import inner_model
from flexalign.pairing.examination import examine_pair
from flexalign.trra.config import TrRaConfig
from flexalign.trra.forward import HeadForm, require_plain_head
from flexalign.trra.teachers import Teacher

__all__ = [
    "PLACES",
    "STUDENT_ADAPTER",
    "Model",
    "Parts",
    "choose_attention",
    "is_adapter",
    "loading_options",
    "require_one_vocabulary",
    "require_trainable",
    "running_dtype",
    "with_adapter",
]

STUDENT_ADAPTER = "default"
"""The one name under which PEFT saves an adapter as the folder itself."""

Model = str | Path | Source | nn.Module

PLACES = (str, Path, Source)


@dataclass(frozen=True)
class Parts:
    """A student, its two teachers and their tokenizer.

    Attributes:
        student: What is trained: a transformers model, or a PEFT wrapper of one.
        form: The form of its head.
        reference: The teacher of λ=0; None if its hidden states come from a cache.
        aligned: The teacher of λ=1; None likewise.
        tokenizer: Of all three.
    """

    student: nn.Module
    form: HeadForm
    reference: Teacher | None
    aligned: Teacher | None
    tokenizer: PreTrainedTokenizerBase

    def models(self) -> dict[str, nn.Module]:
        """Return the modules by their role, each once."""
        teachers = {"reference": self.reference, "aligned": self.aligned}
        own = {role: t.model for role, t in teachers.items() if t and not t.shares_student}
        return {"student": self.student, **own}


def loading_options(args: TrRaConfig) -> dict[str, bool]:
    """What the run permits that loading could otherwise not do safely."""
    return {"trust_remote_code": args.trust_remote_code, "allow_pickle": args.allow_pickle}


def running_dtype(args: Any) -> torch.dtype:
    """What frozen models are loaded in: bfloat16 in a run that computes in it, else float32."""
    return torch.bfloat16 if args.bf16 else torch.float32


def choose_attention(parts: Parts, args: TrRaConfig) -> None:
    """Let all three models attend by ``model_init_kwargs.attn_implementation``, if it is given.

    Raises:
        ConfigError: If it is not to be had here, or not by one of the models.
    """
    wanted = (args.model_init_kwargs or {}).get("attn_implementation")
    if wanted is None:
        return
    for role, model in parts.models().items():
        inner: Any = inner_model(model)
        try:
            inner.set_attn_implementation(wanted)
        except (ImportError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())[:300]
            raise ConfigError(f"attn_implementation={wanted!r} for the {role}: {said}") from error


def is_adapter(model: Model | None) -> bool:
    """Whether a model is a PEFT adapter: its folder, or a wrapper."""
    if isinstance(model, PLACES):
        return resolve(model).is_adapter
    return isinstance(model, PeftModel)


def require_one_vocabulary(reference: Any, model: Any, args: TrRaConfig) -> None:
    """Make sure that a student has the reference's tokens.

    Raises:
        PairMismatchError: If not.
    """
    facts = examine_pair(reference, model, trust_remote_code=args.trust_remote_code)
    if facts.problems:
        raise PairMismatchError(
            f"the student {model} does not fit the reference {reference}: "
            + " Also: ".join(facts.problems)
        )


def with_adapter(base: nn.Module, args: TrRaConfig, peft_config: PeftConfig) -> PeftModel:
    """Put a fresh adapter on a base, drawn from the run's seed."""
    set_seed(args.seed)
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    # ZeRO-3 gathers parameters of one dtype only.
    return get_peft_model(
        base, peft_config, adapter_name=STUDENT_ADAPTER, autocast_adapter_dtype=not zero3
    )


def require_trainable(student: nn.Module) -> None:
    """Make sure that a student can be trained by our loss.

    Raises:
        ConfigError: If no weight of it is trainable.
        UnsupportedModelError: If its head is not a plain one.
    """
    require_plain_head(student)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ConfigError(
            "no weight of the student is trainable (a teacher's copy is frozen like it); call "
            "requires_grad_(True) on the model, or give a peft_config."
        )
