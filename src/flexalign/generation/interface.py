"""The interface of a model with a dial, which policies and the local server use.

:class:`flexalign.generation.fused.FusedDecoding` implements the part that :class:`InRaModel`,
:class:`LoRADial` and :class:`TwoModelDecoder` have in common. This module imports neither them nor the policies
(:mod:`flexalign.generation.policies`): both import it, and not each other.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from flexalign.data.thinking import ThinkingTags
from flexalign.generation.row_lambdas import RowDials, TagTokens
from flexalign.lambdas import Adaptive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Phase: TypeAlias = tuple[Tensor, RowDials]
"""Rows of a prefilled batch, shape ``(n,)``, and their dials in one generation."""


class DialModel(ABC):
    """A model that generates with one dial per prompt.

    ``options`` are always the caller's arguments of ``generate`` other than the prompts and λ.

    Attributes:
        row_inputs: Names of tensors that belong to the prompts, each of the shape of ``input_ids``,
            as a second prompt has them; ``generate`` and ``prefill_phases`` take them by name.
    """

    row_inputs: tuple[str, ...] = ()

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
        """Generate as transformers does, each prompt with its own λ.

        Args:
            inputs: Prompts, shape ``(B, T)``, left padded.
            lam: As in :meth:`flexalign.generation.fused.FusedDecoding.generate`.
            policy: The same as ``lam``.
            gate: As in :func:`flexalign.fusion.fuse`.
            **options: Options of transformers' ``generate``.
        """

    @abstractmethod
    def prefill_phases(
        self, input_ids: Tensor, attention_mask: Tensor, phases: Sequence[Phase], **inputs: Tensor
    ) -> Any:
        """Run prompts once for several generations and return their cache.

        Args:
            input_ids: Shape ``(B, T)``, left padded.
            attention_mask: Shape ``(B, T)``.
            phases: For each generation, its rows of the batch and their dials, which know the λ of
                the first generated token.
            **inputs: The model's :attr:`row_inputs`.

        Returns:
            The cache; None if the model's cannot be copied, and each generation runs its prompts.
        """

    @abstractmethod
    def fork_cache(self, cache: Any, rows: Tensor, dials: RowDials) -> Any:
        """Return a new cache for rows of a prefilled one, which does not change.

        Args:
            cache: A cache of :meth:`prefill_phases`.
            rows: The rows, shape ``(n,)``.
            dials: The dials of these rows. The new cache holds only what they need.
        """

    @abstractmethod
    def generation_option(self, name: str, options: dict[str, Any]) -> Any:
        """Return an option of ``generate``, given directly or in a generation config."""

    @abstractmethod
    def check_options(self, options: dict[str, Any]) -> None:
        """Refuse options that models with a dial do not support.

        Raises:
            ConfigError: If there is such an option.
        """

    @abstractmethod
    def pad_token(self, options: dict[str, Any]) -> int:
        """Return the token that responses are padded with."""

    @abstractmethod
    def require_tokenizer(self, purpose: str, options: dict[str, Any]) -> "PreTrainedTokenizerBase":
        """Return the tokenizer of the options, or else the model's.

        Args:
            purpose: What needs the tokenizer, for the message.
            options: The options of ``generate``.

        Raises:
            ConfigError: If there is none.
        """

    @abstractmethod
    def tag_tokens(self, options: dict[str, Any]) -> TagTokens:
        """Return the tokens of the thinking tags, which some schedules follow.

        Args:
            options: The options of ``generate``.

        Raises:
            ConfigError: If they are not known, or cannot be found in token ids.
        """

    @property
    @abstractmethod
    def thinking_tags(self) -> ThinkingTags | None:
        """The model's thinking tags; None if its tokenizer's are used."""

    @abstractmethod
    def threshold(self, policy: Adaptive) -> float:
        """Return the smallest confidence that an adaptive policy accepts."""
