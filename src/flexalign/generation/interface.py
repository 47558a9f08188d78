"""What policies, and the local server, ask of a model with a dial: its declared interface.

:class:`flexalign.generation.fused.FusedDecoding` implements the part that :class:`InRaModel` and
:class:`TwoModelDecoder` have in common. This module imports neither them nor the policies
(:mod:`flexalign.generation.adaptive`), so that both sides stand on it and not on each other.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from flexalign.data.thinking import ThinkingTags
from flexalign.generation.row_lambdas import RowDials
from flexalign.lambdas import Adaptive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Phase: TypeAlias = tuple[Tensor, RowDials]
"""Rows of a prefilled batch, shape ``(n,)``, and the dials that they follow in one generation."""


class DialModel(ABC):
    """A model that generates with one dial per prompt.

    ``options`` is always what a caller gave ``generate`` beside its prompts and λ.
    """

    @abstractmethod
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        lam: Any = None,
        policy: Any = None,
        gate: float | None = None,
        **options: Any,
    ) -> Any:
        """Generate as transformers does, every prompt by its own λ.

        Args:
            inputs: Prompts, shape ``(B, T)``, left padded.
            lam: What λ follows; see :meth:`flexalign.generation.fused.FusedDecoding.generate`.
            policy: The same as ``lam``.
            gate: As in :func:`flexalign.fusion.fuse`.
            **options: Whatever transformers' ``generate`` takes.
        """

    @abstractmethod
    def prefill_phases(
        self, input_ids: Tensor, attention_mask: Tensor, phases: Sequence[Phase]
    ) -> Any:
        """Run prompts once for several generations and return their cache.

        Args:
            input_ids: Shape ``(B, T)``, left padded.
            attention_mask: Shape ``(B, T)``.
            phases: For each generation its rows of the batch and their dials.
        """

    @abstractmethod
    def fork_cache(self, cache: Any, rows: Tensor, dials: RowDials) -> Any:
        """Return a cache for rows of a prefilled one, which stays as it is.

        Args:
            cache: Of :meth:`prefill_phases`.
            rows: Shape ``(n,)``.
            dials: The dials of these rows: the new cache holds what they need, and no more.
        """

    @abstractmethod
    def generation_option(self, name: str, options: dict[str, Any]) -> Any:
        """Return an option of ``generate``, given directly or in a generation config."""

    @abstractmethod
    def check_options(self, options: dict[str, Any]) -> None:
        """Refuse options that no model with a dial can serve.

        Raises:
            ConfigError: If there is one.
        """

    @abstractmethod
    def pad_token(self, options: dict[str, Any]) -> int:
        """Return the token that responses are padded with."""

    @abstractmethod
    def require_tokenizer(self, purpose: str, options: dict[str, Any]) -> "PreTrainedTokenizerBase":
        """Return the tokenizer, of the options or the model's own.

        Raises:
            ConfigError: If none is known; says that ``purpose`` needs it.
        """

    @property
    @abstractmethod
    def thinking_tags(self) -> ThinkingTags | None:
        """The tags that the model is known to use; None for those of its tokenizer."""

    @abstractmethod
    def threshold(self, policy: Adaptive) -> float:
        """Return the smallest confidence that an adaptive policy accepts."""
