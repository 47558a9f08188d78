"""Making a student and two teachers of the models that a user gives: paths, modules or adapters.

A base that several of the three share is in memory once. Training a LoRA student that starts at the
reference does not change the reference's weights, so the reference is the student with its adapters
off. An aligned model that is an adapter on the reference is loaded into the same module. If both
sides are one model under two prompts, they are one teacher, which is asked twice.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, set_seed

from flexalign._modes import evaluating
from flexalign.errors import ConfigError, PairMismatchError
from flexalign.heads import are_equal, last_hidden
from flexalign.models.adapters import AdapterSwitch, inner_model
from flexalign.models.compatibility import examine_pair
from flexalign.models.loading import load_adapter, load_model, load_tokenizer
from flexalign.models.pair import ModelPair
from flexalign.models.sources import Source, resolve
from flexalign.training.config import TrRaConfig
from flexalign.training.distributed import place_teacher
from flexalign.training.forward import HeadForm, gathered_head, require_plain_head, run_inside

Model = str | Path | Source | nn.Module
"""The forms in which a user may give a model."""

PLACES = (str, Path, Source)
"""The forms that are read from disk."""

STUDENT_ADAPTER = "default"
"""The student's adapter. PEFT saves only an adapter of this name into the folder itself."""

ALIGNED_ADAPTER = "aligned"
"""The aligned model's adapter, if both are adapters on one base."""


@dataclass
class Teacher:
    """One model of the pair, which computes hidden states for the loss.

    It is a separate module, or adapters on the student's base. If the aligned model is a PEFT
    adapter on the reference and the student a LoRA on the same base, one module holds all three:
    the reference is that module with all adapters off, and the aligned model is that module with
    its adapter on. Switching adapters does not change ``requires_grad``, so the optimizer and a DDP
    wrapper see the same parameters at all times.

    Attributes:
        model: The module: a transformers model, or a PEFT wrapper of one.
        adapters: The adapters to switch on for this model, all others off. None: no change.
        form: The form of its head.
        shares_student: Whether `model` is the student's own module.
        switch: A context for every pass. It selects this model in a module where PEFT does not.
    """

    model: nn.Module
    adapters: tuple[str, ...] | None
    form: HeadForm
    shares_student: bool
    switch: Callable[[], AbstractContextManager[None]] = nullcontext
    _wrapped: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self._wrapped = self.model

    def prepare(self, accelerator: Accelerator, *, deepspeed: bool, fsdp: bool) -> None:
        """Move or shard a separate module as the student is; do nothing if it is the student's."""
        if self.shares_student:
            return
        self._wrapped = place_teacher(self.model, accelerator, deepspeed=deepspeed, fsdp=fsdp)

    @torch.no_grad()
    def hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the final hidden states, shape ``(B, T, H)``, without gradient or dropout.

        A teacher that shares the student's module must be called within the student's forward.
        """
        inner = inner_model(self.model)
        with as_teacher(self.model, self.adapters), self.switch():
            if self.shares_student:
                return last_hidden(inner, **inputs)
            return run_inside(
                self._wrapped, inner, lambda **given: last_hidden(inner, **given), **inputs
            )


def have_equal_heads(reference: Teacher, aligned: Teacher) -> bool:
    """Return whether two teachers with modules of their own have heads of equal values.

    Sharded heads are gathered for the comparison, in all processes.
    """
    if reference.shares_student or aligned.shares_student:
        return False
    if reference is aligned:  # one model under two prompts
        return True
    with (
        gathered_head(reference.model, reference.form) as one,
        gathered_head(aligned.model, aligned.form) as other,
    ):
        return are_equal(one, other)


@contextmanager
def as_teacher(model: nn.Module, adapters: tuple[str, ...] | None) -> Iterator[None]:
    """Switch dropout off and select adapters inside the block; restore both on exit.

    Args:
        model: A transformers model or a PEFT wrapper.
        adapters: Names of the adapters to switch on, all others off. None: no change.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if adapters is not None and isinstance(model, PeftModel):
            stack.enter_context(AdapterSwitch(model).use(adapters))
        yield


@dataclass(frozen=True)
class TrainingModels:
    """A student, its two teachers and their tokenizer.

    Attributes:
        student: The model that is trained: a transformers model, or a PEFT wrapper of one.
        form: The form of its head.
        reference: The teacher of λ=0. None if its hidden states come from a cache.
        aligned: The teacher of λ=1. None if its hidden states come from a cache.
        tokenizer: The tokenizer of all three.
    """

    student: nn.Module
    form: HeadForm
    reference: Teacher | None
    aligned: Teacher | None
    tokenizer: PreTrainedTokenizerBase

    def models(self) -> dict[str, nn.Module]:
        """Return the modules by role; a teacher in the student's module is left out."""
        teachers = {"reference": self.reference}
        if self.aligned is not self.reference:
            teachers["aligned"] = self.aligned
        own = {role: t.model for role, t in teachers.items() if t and not t.shares_student}
        return {"student": self.student, **own}


def assemble(
    model: Model | None,
    reference: Model | None,
    aligned: Model | None,
    pair: ModelPair | None,
    args: TrRaConfig,
    peft_config: PeftConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompted: bool = False,
) -> TrainingModels:
    """Load the models, check that they fit together, and share bases where possible.

    Args:
        model: The student's start. None: the reference.
        reference: The model of λ=0. None: `model` as it is now.
        aligned: The model of λ=1.
        pair: Reference and aligned model, loaded, instead of these two.
        args: The settings. Precision and, for a new adapter, the seed are read from them.
        peft_config: Makes the student an adapter on its start.
        tokenizer: The tokenizer; required if the models are given as modules.
        prompted: Both sides are asked under prompts of their own, so they may be one model.

    Raises:
        ConfigError: If models are missing or contradict each other.
        UnsupportedModelError: If an adapter changes the head, or a head is not a plain one.
        PairMismatchError: If the models do not fit together.
    """
    if pair is not None and (reference is not None or aligned is not None):
        raise ConfigError("pair already holds reference and aligned; give one or the other.")
    if peft_config is not None and is_adapter(model):
        raise ConfigError("model is an adapter already; leave out peft_config to train it on.")

    # Two equal paths are the same model, which is loaded once.
    at_reference = model is None or (reference is None and pair is None)
    if isinstance(model, PLACES) and isinstance(reference, PLACES):
        at_reference = str(model) == str(reference)
        if not at_reference:
            require_one_vocabulary(reference, model, args)
    if pair is None:
        pair = _load_pair(model, reference, aligned, args, peft_config, tokenizer, prompted)

    # An adapter on the reference does not change its weights, so both share one base.
    at_reference = at_reference or model is pair.reference
    if _is_adapter_of(model, pair) or (at_reference and peft_config is not None):
        return _on_the_base(model, pair, args, peft_config)

    student = _own_student(model, reference, pair, at_reference, args)
    if peft_config is not None:
        student = with_adapter(student, args, peft_config)

    if pair.shared_base:
        names: tuple[str, ...] = tuple(pair.aligned.active_adapters)
        return _parts(student, pair, (pair.aligned, ()), (pair.aligned, names))
    return _parts(student, pair, (pair.reference, None), (pair.aligned, None))


def _load_pair(
    model: Model | None,
    reference: Model | None,
    aligned: Model | None,
    args: TrRaConfig,
    peft_config: PeftConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    prompted: bool,
) -> ModelPair:
    start = model if reference is None else reference
    if start is None or aligned is None:
        raise ConfigError("TrRa needs a reference and an aligned model, or a pair of them.")
    options: dict[str, Any] = {
        "dtype": running_dtype(args),
        **loading_options(args),
    }
    if isinstance(start, PLACES) and isinstance(aligned, PLACES):
        return ModelPair.load(start, aligned, prompted=prompted, by_id=args.by_id, **options)

    is_one = start is aligned  # before the student may get a copy of it
    if isinstance(start, PLACES):
        tokenizer = tokenizer or load_tokenizer(start, trust_remote_code=args.trust_remote_code)
        start = load_model(start, **options)
    elif start is model and peft_config is None:
        start = copy.deepcopy(start)  # the given module will be trained, so the reference is a copy
    if tokenizer is None:
        raise ConfigError("the models are modules; give their tokenizer as processing_class.")

    if is_one:
        other: nn.Module = start
    elif isinstance(aligned, PLACES):
        source = resolve(aligned)
        other = (
            load_adapter(start, source, name=ALIGNED_ADAPTER, allow_pickle=args.allow_pickle)
            if source.is_adapter
            else load_model(source, **options)
        )
    else:
        other = aligned
    return ModelPair.of(start, other, tokenizer, prompted=prompted)


def _on_the_base(
    model: Model | None, pair: ModelPair, args: TrRaConfig, peft_config: PeftConfig | None
) -> TrainingModels:
    """Make the student an adapter on the pair's base, next to the aligned adapter if there is one."""
    aligned_adapters: tuple[str, ...] | None = None
    folder = model if isinstance(model, PLACES) and peft_config is None else None
    onto: dict[str, Any] = {
        "name": STUDENT_ADAPTER,
        "trainable": True,
        "allow_pickle": args.allow_pickle,
    }

    if pair.one_model:
        aligned_adapters = ()  # the aligned side is the base too, under another prompt
    if isinstance(model, PeftModel):
        student = model
    elif not pair.shared_base:
        base = inner_model(pair.reference)
        if folder is not None:
            student = load_adapter(base, folder, **onto)
        else:
            student = with_adapter(base, args, peft_config)
    else:
        student = pair.aligned
        aligned_adapters = (_free_the_name(student),)
        if folder is not None:
            load_adapter(student, folder, **onto)
        else:
            set_seed(args.seed)
            student.add_adapter(STUDENT_ADAPTER, peft_config)
        student.set_adapter(STUDENT_ADAPTER)

        # Save only the student's adapter, without the aligned one.
        student.save_pretrained = functools.partial(
            student.save_pretrained, selected_adapters=[STUDENT_ADAPTER]
        )

    aligned = (pair.aligned if aligned_adapters is None else student, aligned_adapters)
    return _parts(student, pair, (student, ()), aligned)


def _own_student(
    model: Model | None,
    reference: Model | None,
    pair: ModelPair,
    at_reference: bool,
    args: TrRaConfig,
) -> nn.Module:
    """Return a student with its own weights: the given module, a loaded model, or a copy."""
    if isinstance(model, nn.Module) and model is not pair.reference:
        return model

    path = model if model is not None else reference
    if isinstance(path, PLACES):
        dtype = (args.model_init_kwargs or {}).get("dtype", torch.float32)
        loaded: nn.Module = load_model(path, dtype=dtype, **loading_options(args))
        return loaded

    # The pair's module is the teacher, so the student is a copy of it, in float32.
    source = (
        copy.deepcopy(pair.aligned).unload() if pair.shared_base else copy.deepcopy(pair.reference)
    )
    copied: nn.Module = source.float().requires_grad_(True)
    return copied


def _free_the_name(model: PeftModel) -> str:
    """Return the aligned adapter's name; rename it first if it has the student's name."""
    name = str(model.active_adapters[0])
    if name != STUDENT_ADAPTER:
        return name

    # PEFT cannot rename an adapter, so its weights are copied into a second one.
    state = get_peft_model_state_dict(model, adapter_name=name)
    model.add_adapter(ALIGNED_ADAPTER, model.peft_config[name])
    set_peft_model_state_dict(model, state, adapter_name=ALIGNED_ADAPTER)
    model.set_adapter(ALIGNED_ADAPTER)
    model.delete_adapter(name)
    return ALIGNED_ADAPTER


def _is_adapter_of(model: Model | None, pair: ModelPair) -> bool:
    """Return whether the student is given as an adapter on the reference: a folder, or a module."""
    if isinstance(model, PeftModel):
        return inner_model(model) is inner_model(pair.reference)
    return is_adapter(model)


def _parts(
    student: nn.Module,
    pair: ModelPair,
    reference: tuple[nn.Module, tuple[str, ...] | None],
    aligned: tuple[nn.Module, tuple[str, ...] | None],
) -> TrainingModels:
    require_trainable(student)

    forms: dict[int, HeadForm] = {}
    for model in (student, reference[0], aligned[0]):
        if id(model) not in forms:
            forms[id(model)] = HeadForm.of(model, pair.vocab_size)
        if model is not student:
            model.eval().requires_grad_(False)

    def teacher(side: tuple[nn.Module, tuple[str, ...] | None]) -> Teacher:
        model, adapters = side
        return Teacher(model, adapters, forms[id(model)], shares_student=model is student)

    first = teacher(reference)
    second = first if pair.one_model else teacher(aligned)
    return TrainingModels(student, forms[id(student)], first, second, pair.tokenizer)


# For all students, with teachers in memory or in a cache.


def loading_options(args: TrRaConfig) -> dict[str, bool]:
    """Return the permissions of a run that loading needs: remote code and pickled weights."""
    return {"trust_remote_code": args.trust_remote_code, "allow_pickle": args.allow_pickle}


def running_dtype(args: Any) -> torch.dtype:
    """Return the dtype of frozen models: bfloat16 if the run computes in it, else float32."""
    return torch.bfloat16 if args.bf16 else torch.float32


def choose_attention(parts: TrainingModels, args: TrRaConfig) -> None:
    """Set the attention of all models to ``model_init_kwargs.attn_implementation``, if given.

    Raises:
        ConfigError: If it is not installed, or one of the models does not support it.
    """
    wanted = (args.model_init_kwargs or {}).get("attn_implementation")
    if wanted is None:
        return
    for role, model in parts.models().items():
        inner: Any = inner_model(model)
        try:
            inner.set_attn_implementation(wanted)
        except (ImportError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"attn_implementation={wanted!r} for the {role}: {reason}") from error


def is_adapter(model: Model | None) -> bool:
    """Return whether a model is a PEFT adapter: a folder of one, or a PEFT wrapper."""
    if isinstance(model, PLACES):
        return resolve(model).is_adapter
    return isinstance(model, PeftModel)


def require_one_vocabulary(reference: Any, model: Any, args: TrRaConfig) -> None:
    """Check that a student has the tokens of the reference.

    Raises:
        PairMismatchError: If it has others.
    """
    facts = examine_pair(
        reference, model, trust_remote_code=args.trust_remote_code, by_id=args.by_id
    )
    if facts.problems:
        raise PairMismatchError(
            f"the student {model} does not fit the reference {reference}: "
            + " Also: ".join(facts.problems)
        )


def with_adapter(base: nn.Module, args: TrRaConfig, peft_config: PeftConfig) -> PeftModel:
    """Put a new adapter on a base, initialised with the run's seed."""
    set_seed(args.seed)
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    # ZeRO-3 gathers parameters of one dtype only.
    return get_peft_model(
        base, peft_config, adapter_name=STUDENT_ADAPTER, autocast_adapter_dtype=not zero3
    )


def require_trainable(student: nn.Module) -> None:
    """Check that a student can be trained with this loss.

    Raises:
        ConfigError: If none of its weights is trainable.
        UnsupportedModelError: If its head is not a plain one.
    """
    require_plain_head(student)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ConfigError(
            "no weight of the student is trainable (a teacher's copy is frozen like it); call "
            "requires_grad_(True) on the model, or give a peft_config."
        )
