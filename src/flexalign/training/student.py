"""The student of a run whose teachers are in a cache: only the student is loaded."""

import copy
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from flexalign.data import data_fingerprint
from flexalign.errors import ConfigError
from flexalign.models.loading import fingerprint, load_adapter, load_model, load_tokenizer
from flexalign.models.sources import base_of, resolve
from flexalign.training.config import TrRaConfig
from flexalign.training.forward import HeadForm
from flexalign.training.hidden_cache import HiddenStateCache, identity_of
from flexalign.training.models import (
    PLACES,
    STUDENT_ADAPTER,
    Model,
    TrainingModels,
    is_adapter,
    loading_options,
    require_one_vocabulary,
    require_trainable,
    with_adapter,
)
from flexalign.training.pair_rows import PairRows

_NO_START = "teacher='cached' holds no model; give the student's start as model."


def tokenizer_of(start: Model | None, args: TrRaConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a student's start.

    Raises:
        ConfigError: If the start is not given, or is not a path.
    """
    if start is None:
        raise ConfigError(_NO_START)
    if not isinstance(start, PLACES):
        raise ConfigError("the model is a module; give its tokenizer as processing_class.")
    return load_tokenizer(start, trust_remote_code=args.trust_remote_code)


def require_fit(
    cache: HiddenStateCache,
    pair: tuple[Model | None, Model | None],
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: TrRaConfig,
    pair_rows: PairRows | None = None,
) -> None:
    """Check, before anything is loaded, that a cache is of the pair and the data of a run.

    Args:
        cache: An open cache.
        pair: The reference and the aligned model. If one is None, the pair is not compared.
        dataset: The training data, as the trainer takes it.
        tokenizer: The pair's tokenizer.
        args: The settings.
        pair_rows: Renders the data under two prompts, if the sides have prompts of their own.

    Raises:
        ConfigError: If the cache does not fit; names the differences.
    """
    if not isinstance(dataset, Dataset):
        raise ConfigError("teacher='cached' needs a data set that is there whole; load it first.")
    given = [model for model in pair if model is not None]
    if any(isinstance(model, PeftModel) for model in given):
        raise ConfigError("teacher='cached': give an adapter as its folder, or leave it out.")
    prints = tuple(None if model is None else fingerprint(model) for model in pair)
    identity = identity_of(
        cast("tuple[str | None, str | None]", prints),
        data_fingerprint(dataset),
        tokenizer,
        args,
        pair_rows,
    )
    if len(given) < len(pair):
        del identity["pair"]
    cache.require_same(identity)


def assemble_student(
    model: Model | None,
    reference: Model | None,
    args: TrRaConfig,
    vocab_size: int,
    peft_config: PeftConfig | None,
    tokenizer: PreTrainedTokenizerBase,
) -> TrainingModels:
    """Load the student of a run whose teachers are in a cache.

    Args:
        model: Its start. None: the reference.
        reference: The model of λ=0.
        args: The settings.
        vocab_size: Tokens that the cached heads score.
        peft_config: Makes the student an adapter on its start.
        tokenizer: The pair's.

    Raises:
        ConfigError: If there is no start, or it cannot be trained.
        UnsupportedModelError: As in `assemble`.
    """
    start = reference if model is None else model
    if start is None:
        raise ConfigError(_NO_START)
    if peft_config is not None and is_adapter(start):
        raise ConfigError("model is an adapter already; leave out peft_config to train it on.")
    if isinstance(model, PLACES) and isinstance(reference, PLACES) and model != reference:
        require_one_vocabulary(reference, model, args)
    if isinstance(start, nn.Module):
        student = start if model is not None else copy.deepcopy(start).float()
    else:
        student = _load_student(start, reference, args, frozen=peft_config is not None)
    if peft_config is not None:
        student = with_adapter(student, args, peft_config)
    require_trainable(student)
    return TrainingModels(student, HeadForm.of(student, vocab_size), None, None, tokenizer)


def _load_student(
    start: Any, reference: Model | None, args: TrRaConfig, *, frozen: bool
) -> nn.Module:
    """Load a student's start: frozen weights in the run's precision, trained ones in float32."""
    source = resolve(start)
    half = torch.bfloat16 if args.bf16 and (frozen or source.is_adapter) else torch.float32
    options: dict[str, Any] = {
        "dtype": (args.model_init_kwargs or {}).get("dtype", half),
        **loading_options(args),
    }
    if not source.is_adapter:
        loaded: nn.Module = load_model(source, **options)
        return loaded
    base = reference if isinstance(reference, PLACES) else base_of(source)
    student: nn.Module = load_adapter(
        load_model(base, **options),
        source,
        name=STUDENT_ADAPTER,
        trainable=True,
        allow_pickle=args.allow_pickle,
    )
    return student
