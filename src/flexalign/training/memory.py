"""Estimating the memory of a run from configurations, without loading weights.

With P parameters, N of them trained (a LoRA's own, or all), B·T tokens in one forward pass, L
layers of width H and inner width I, V tokens in the vocabulary, and C tokens in a chunk of the
loss, in bytes::

    weights      4·N + b·P(reference) + b·P(aligned)              b = 2 in bf16, else 4; of an
                                                                  aligned adapter its own P
                 4·N + b·V·H·heads                                with cached teachers; for a LoRA
                                                                  plus its base, b·P(reference)
    gradients    4·N
    optimizer    8·N                                              AdamW: two float32 moments
    activations  a·B·T·(L·H + 14·H + 4·I)                         with gradient checkpointing
                 a·B·T·L·(14·H + 4·I)                             without; a = b
    loss         4·(7·C·V + B·T·H + V·H)                          V·H only if the head is trained

A LoRA student shares the reference's weights. The activation terms are those of a gated MLP with
attention that stores no T×T matrix. They are 0 to 30 % higher than what Llama- and Qwen-like layers
store. Measured runs took 0.93 to 1.05 times the total (``benchmarks/scaling.py``). Gradients and
activations are added, because they exist at the same time in a step of several passes.
"""

from dataclasses import asdict, dataclass
from typing import Any

from flexalign.errors import ConfigError
from flexalign.models.loading import skeleton
from flexalign.training.forward import require_plain_head

_GIB = 2**30
_FLOAT32 = 4
_CHUNK_MATRICES = 7
_ADAMW_BYTES = 8


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters of a student: those of its base, and those that are trained."""

    base: int
    trainable: int


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a run needs on one device, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """The sum of all bytes."""
        return sum(asdict(self).values())

    def to_gib(self) -> dict[str, float]:
        """Return the parts and their ``total`` in GiB, rounded."""
        parts = asdict(self) | {"total": self.total}
        return {name: round(size / _GIB, 4) for name, size in parts.items()}


def count_parameters(config: Any, peft_config: Any = None) -> Sizes:
    """Count a model's parameters by building it without allocating them.

    Args:
        config: A transformers configuration.
        peft_config: If given, the adapter's parameters are the trained ones.

    Raises:
        ConfigError: If PEFT finds nothing to adapt.
        UnsupportedModelError: If the adapter changes the head, or adds virtual tokens to the input.
    """
    model = skeleton(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    if peft_config is None:
        return Sizes(total, total)
    import torch
    from peft import get_peft_model

    with torch.device("meta"):
        try:
            model = get_peft_model(model, peft_config)
        except ValueError as error:
            raise ConfigError(f"lora: {' '.join(str(error).split())}") from error
    require_plain_head(model)
    trainable = sum(part.numel() for part in model.parameters() if part.requires_grad)
    return Sizes(total, trainable)


def estimate_memory(
    config: Any,
    student: Sizes,
    *,
    aligned_parameters: int,
    cached_heads: int | None = None,
    rows: int,
    tokens: int,
    chunk_size: int,
    half_precision: bool,
    checkpointing: bool,
) -> MemoryNeed:
    """Estimate the memory of a run on one device, by the formula at the top of this module.

    Args:
        config: The reference model's configuration.
        student: From `count_parameters`.
        aligned_parameters: Parameters of the aligned model, or of its adapter.
        cached_heads: Number of heads in the cache of the teachers: 1 if they share it, else 2. None
            if the teachers are loaded.
        rows: Rows in one forward pass, B.
        tokens: Tokens of the longest row, T.
        chunk_size: C.
        half_precision: Whether the run is in bf16.
        checkpointing: Whether activations are recomputed layer by layer.
    """
    text = config.get_text_config()
    width, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    inner = getattr(text, "intermediate_size", None) or 4 * width
    small = 2 if half_precision else _FLOAT32
    positions = rows * tokens
    layer = 14 * width + 4 * inner
    kept = layers * width + layer if checkpointing else layers * layer

    trains_all = student.trainable == student.base
    held = student.base + aligned_parameters
    if cached_heads is not None:
        held = (0 if trains_all else student.base) + cached_heads * vocabulary * width

    weights = _FLOAT32 * student.trainable + small * held
    head_gradient = vocabulary * width if trains_all else 0
    loss = _CHUNK_MATRICES * min(chunk_size, positions) * vocabulary + positions * width
    return MemoryNeed(
        weights=weights,
        gradients=_FLOAT32 * student.trainable,
        optimizer=_ADAMW_BYTES * student.trainable,
        activations=small * positions * kept,
        loss=_FLOAT32 * (loss + head_gradient),
    )
