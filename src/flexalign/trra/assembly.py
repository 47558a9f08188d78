"""From what the user names (paths, modules, adapters) to a student and two teachers.

A base that serves more than one of the three is held once: a LoRA student that starts at the
reference leaves the reference's weights as they are, so the reference is the student with its
adapters off; and an aligned model that is an adapter on the reference joins them there.
"""

import copy
import functools
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from flexalign.errors import ConfigError
from flexalign.loading import load_adapter, load_model, load_tokenizer, resolve
from flexalign.pairing import ModelPair
from flexalign.pairing.adapters import inner_model
from flexalign.trra.config import TrRaConfig
from flexalign.trra.forward import HeadForm
from flexalign.trra.parts import (
    PLACES,
    STUDENT_ADAPTER,
    Model,
    Parts,
    is_adapter,
    loading_options,
    require_one_vocabulary,
    require_trainable,
    running_dtype,
    with_adapter,
)
from flexalign.trra.teachers import Teacher

__all__ = ["ALIGNED_ADAPTER", "STUDENT_ADAPTER", "Model", "Parts", "assemble"]

ALIGNED_ADAPTER = "aligned"


def assemble(
    model: Model | None,
    reference: Model | None,
    aligned: Model | None,
    pair: ModelPair | None,
    args: TrRaConfig,
    peft_config: PeftConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Parts:
    """Load what is named, check that it fits, and let shared bases be one.

    Args:
        model: Where the student starts; None: at the reference.
        reference: The model of λ=0; None: `model` as it is now.
        aligned: The model of λ=1.
        pair: Both, loaded; instead of the two.
        args: The settings: the precision and, for a new adapter, the seed are read from them.
        peft_config: Makes the student an adapter on its start.
        tokenizer: Of modules that do not come from a folder.

    Raises:
        ConfigError: If models are missing or contradict each other.
        UnsupportedModelError: If an adapter changes the head, or a head is not a plain one.
    """
    if pair is not None and (reference is not None or aligned is not None):
        raise ConfigError("pair already holds reference and aligned; give one or the other.")
    if peft_config is not None and is_adapter(model):
        raise ConfigError("model is an adapter already; leave out peft_config to train it on.")
    at_reference = model is None or (reference is None and pair is None)
    if isinstance(model, PLACES) and isinstance(reference, PLACES):
        at_reference = str(model) == str(reference)
        if not at_reference:
            require_one_vocabulary(reference, model, args)
    if pair is None:
        pair = _load_pair(model, reference, aligned, args, peft_config, tokenizer)
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
) -> ModelPair:
    start = model if reference is None else reference
    if start is None or aligned is None:
        raise ConfigError("TrRa needs a reference and an aligned model, or a pair of them.")
    options: dict[str, Any] = {
        "dtype": running_dtype(args),
        **loading_options(args),
    }
    if isinstance(start, PLACES) and isinstance(aligned, PLACES):
        return ModelPair.load(start, aligned, **options)
    if isinstance(start, PLACES):
        tokenizer = tokenizer or load_tokenizer(start, trust_remote_code=args.trust_remote_code)
        start = load_model(start, **options)
    elif start is model and peft_config is None:
        start = copy.deepcopy(start)  # the module itself is going to be trained
    if tokenizer is None:
        raise ConfigError("the models are modules; give their tokenizer as processing_class.")
    if isinstance(aligned, PLACES):
        source = resolve(aligned)
        other: nn.Module = (
            load_adapter(start, source, name=ALIGNED_ADAPTER, allow_pickle=args.allow_pickle)
            if source.is_adapter
            else load_model(source, **options)
        )
    else:
        other = aligned
    return ModelPair.of(start, other, tokenizer)


def _on_the_base(
    model: Model | None, pair: ModelPair, args: TrRaConfig, peft_config: PeftConfig | None
) -> Parts:
    """Make the student an adapter on the pair's own base, beside the aligned adapter if any."""
    aligned_adapters = None
    folder = model if isinstance(model, PLACES) and peft_config is None else None
    onto: dict[str, Any] = {
        "name": STUDENT_ADAPTER,
        "trainable": True,
        "allow_pickle": args.allow_pickle,
    }
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
        # What is saved is the student, without the frozen adapter beside it.
        student.save_pretrained = functools.partial(
            student.save_pretrained, selected_adapters=[STUDENT_ADAPTER]
        )
    aligned = (student if aligned_adapters else pair.aligned, aligned_adapters)
    return _parts(student, pair, (student, ()), aligned)


def _own_student(
    model: Model | None,
    reference: Model | None,
    pair: ModelPair,
    at_reference: bool,
    args: TrRaConfig,
) -> nn.Module:
    """Give a student with weights of its own."""
    if isinstance(model, nn.Module) and model is not pair.reference:
        return model
    path = model if model is not None else reference
    if isinstance(path, PLACES):
        dtype = (args.model_init_kwargs or {}).get("dtype", torch.float32)
        loaded: nn.Module = load_model(path, dtype=dtype, **loading_options(args))
        return loaded
    source = (
        copy.deepcopy(pair.aligned).unload() if pair.shared_base else copy.deepcopy(pair.reference)
    )
    copied: nn.Module = source.float().requires_grad_(True)
    return copied


def _free_the_name(model: PeftModel) -> str:
    """Return the aligned adapter's name, moved away from the one that the student needs."""
    name = str(model.active_adapters[0])
    if name != STUDENT_ADAPTER:
        return name
    state = get_peft_model_state_dict(model, adapter_name=name)
    model.add_adapter(ALIGNED_ADAPTER, model.peft_config[name])
    set_peft_model_state_dict(model, state, adapter_name=ALIGNED_ADAPTER)
    model.set_adapter(ALIGNED_ADAPTER)
    model.delete_adapter(name)
    return ALIGNED_ADAPTER


def _is_adapter_of(model: Model | None, pair: ModelPair) -> bool:
    """Whether the student is an adapter on the reference: a folder of one, or a module."""
    if isinstance(model, PeftModel):
        return inner_model(model) is inner_model(pair.reference)
    return is_adapter(model)


def _parts(
    student: nn.Module,
    pair: ModelPair,
    reference: tuple[nn.Module, tuple[str, ...] | None],
    aligned: tuple[nn.Module, tuple[str, ...] | None],
) -> Parts:
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

    return Parts(student, forms[id(student)], teacher(reference), teacher(aligned), pair.tokenizer)
