"""The calibrated dial of one model under two prompts: ``two_prompts.json`` in a folder of its own.

An adapter's calibration is stored in the adapter's folder. Two prompts have none, and what they cost
depends on the model and on both of them: :class:`TwoPromptConfig` holds the calibration, and what it
was measured under.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import PreTrainedTokenizerBase

from flexalign.data.prompting import PromptSettings
from flexalign.data.template import template_hash
from flexalign.errors import CheckpointError, ConfigError
from flexalign.generation.dial_config import DialConfig
from flexalign.models.loading import known_fingerprint
from flexalign.models.pair import SIDES
from flexalign.models.prompted import PromptPair, prompt_text
from flexalign.models.sources import Source


@dataclass(frozen=True)
class TwoPromptConfig(DialConfig):
    """The settings of a dial that is one model under two prompts.

    Attributes:
        prompts: The two prompts, as :meth:`PromptPair.to_json` returns them. Template arguments
            that both sides were given are in both.

    The others are those of :class:`~flexalign.generation.dial_config.DialConfig`. ``base`` and
    ``base_fingerprint`` are the model's, ``rendering`` has the hash of its chat template,
    ``default_lambda`` is 1, and ``lambda_range`` is that of the calibration.

    Raises:
        ConfigError: If a value is malformed.
        LambdaError: If a λ is not finite, or the range is empty.
    """

    CONFIG_FILE: ClassVar[str] = "two_prompts.json"
    KIND: ClassVar[str] = "calibration of two prompts"
    WRITER: ClassVar[str] = "flexalign calibrate MODEL --aligned-prompt"

    prompts: Mapping[str, Any]
    default_lambda: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pair()  # raises if the prompts are malformed

    @classmethod
    def of(
        cls, model: Source, tokenizer: PreTrainedTokenizerBase, prompts: PromptPair
    ) -> "TwoPromptConfig":
        """Describe a model under two prompts; without a calibration.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            prompts: The two prompts, with the template arguments that both have.
        """
        return cls(
            str(model),
            known_fingerprint(model) or "",
            prompts.to_json(),
            rendering={"template": template_hash(tokenizer)},
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the calibration in a folder.

        Raises:
            CheckpointError: If there is none, or the file is corrupt or of a later format.
        """
        settings = super().load(folder)
        if settings.calibration is None:
            raise CheckpointError(
                f"{folder / cls.CONFIG_FILE} has no calibration; run flexalign calibrate again."
            )
        return settings

    def pair(self) -> PromptPair:
        """Return the two prompts.

        Raises:
            ConfigError: If they are malformed.
        """
        given = self.prompts
        if not isinstance(given, Mapping) or set(given) != set(SIDES):
            raise ConfigError(f"prompts must have {' and '.join(SIDES)}, got {given!r}.")
        sides = {}
        for side, prompt in given.items():
            if not isinstance(prompt, Mapping) or not set(prompt) <= {"system", "template"}:
                raise ConfigError(f"prompts.{side} may have system and template, got {prompt!r}.")
            sides[side] = PromptSettings.parse(prompt.get("template"), prompt.get("system"))
        return PromptPair(**sides)

    def require_same(self, asked: "TwoPromptConfig", folder: Path) -> None:
        """Refuse another model or other prompts than the calibration was measured with.

        Args:
            asked: What is asked for, from :meth:`of`. A fingerprint that is not known is not
                compared.
            folder: The calibration's folder, for the message.

        Raises:
            ConfigError: If they differ; the message names the difference.
        """
        again = "run flexalign calibrate for what you ask"
        known = self.base_fingerprint and asked.base_fingerprint
        if known and self.base_fingerprint != asked.base_fingerprint:
            raise ConfigError(
                f"the calibration {folder} is of {self.base} (fingerprint {self.base_fingerprint}), "
                f"and {asked.base} has {asked.base_fingerprint}: other weights; give its own model, "
                f"or {again}."
            )

        measured, given = self.pair(), asked.pair()
        other = [side for side in SIDES if getattr(measured, side) != getattr(given, side)]
        if other:
            differences = ", ".join(
                f"{side}: {_named(getattr(measured, side))} there, "
                f"{_named(getattr(given, side))} here"
                for side in other
            )
            raise ConfigError(
                f"the calibration {folder} was measured under other prompts ({differences}); give "
                f"the same, or {again}."
            )
        if self.rendering != asked.rendering:
            hashes = [(one.rendering or {}).get("template") for one in (self, asked)]
            raise ConfigError(
                f"the calibration {folder} was measured with another chat template (hash "
                f"{hashes[0]}) than {asked.base} has now ({hashes[1]}), so that its prompts are "
                f"others; {again}."
            )


def _named(prompt: PromptSettings) -> str:
    return prompt_text(prompt) or "none"
