"""The settings of a dial that is trained: what an InRa adapter and a LoRA dial store in common.

:class:`DialConfig` is the content of the JSON file in the folder of either. The functions below it
check a folder and the base that it is loaded onto.
"""

import json
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from safetensors import SafetensorError, safe_open

from flexalign.data.template import bind_template, bound_thinking, template_hash
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import (
    CheckpointError,
    ConfigError,
    FlexAlignError,
    LambdaError,
    PairMismatchError,
)
from flexalign.lambdas import Adaptive, OnlyEnds, finite_lambda
from flexalign.models.hub import fetch_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DialConfig:
    """A dial's settings. Change them with ``dataclasses.replace``, or edit the file.

    Attributes:
        base: Name or path of the base model that the dial was made for.
        base_fingerprint: The base's fingerprint (``flexalign.models.loading.fingerprint``); empty
            if it is not known.
        default_lambda: λ of a request that gives none.
        lambda_range: The least and the largest λ that the command line and the server accept. The
            library accepts any finite λ, and warns once if it is outside the range.
        thinking_tags: The opening and the closing tag around the model's thinking. None: the tags
            that the tokenizer defines.
        calibration: The results of calibration, or None.
        format_version: Version of the folder's format.
        rendering: How prompts were rendered in training: `template`, the chat template's hash;
            `arguments`, the template arguments; and `system`, the system message of conversations
            without one, if there was one. None if that is not known.

    Raises:
        ConfigError: If a value is malformed.
        LambdaError: If a λ is not finite, or the range is empty.
    """

    CONFIG_FILE: ClassVar[str]
    """The file that holds the settings."""
    WEIGHTS_FILE: ClassVar[str]
    """The file that holds the weights."""
    FORMAT: ClassVar[int] = 1
    """The version of the folder's format that this flexalign writes and reads."""
    OPTIONAL: ClassVar[tuple[str, ...]] = ("rendering",)
    """Keys that the file leaves out where they say nothing."""
    KIND: ClassVar[str]
    """What the folder holds, for messages."""
    WRITER: ClassVar[str]
    """What writes such a folder, for messages."""

    base: str
    base_fingerprint: str
    default_lambda: float = field(default=0.0, kw_only=True)
    lambda_range: tuple[float, float] = field(default=(0.0, 1.0), kw_only=True)
    thinking_tags: tuple[str, str] | None = field(default=None, kw_only=True)
    calibration: dict[str, Any] | None = field(default=None, kw_only=True)
    format_version: int = field(default=1, kw_only=True)
    rendering: dict[str, Any] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("base", "base_fingerprint"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a text, got {getattr(self, name)!r}.")

        default = finite_lambda(self.default_lambda, "default_lambda")
        object.__setattr__(self, "default_lambda", default)

        limits = self.lambda_range
        if not isinstance(limits, list | tuple) or len(limits) != 2:
            raise ConfigError(f"lambda_range must be [least, largest], got {limits!r}.")
        low, high = (finite_lambda(limit, "lambda_range") for limit in limits)
        if low > high:
            raise LambdaError(f"lambda_range must be [least, largest], got [{low:g}, {high:g}].")
        if not isinstance(limits, OnlyEnds):
            object.__setattr__(self, "lambda_range", (low, high))

        if self.rendering is not None and not isinstance(self.rendering, dict):
            raise ConfigError(f"rendering must be a mapping, got {self.rendering!r}.")

        if self.thinking_tags is not None:
            tags = ThinkingTags(*self.thinking_tags)
            object.__setattr__(self, "thinking_tags", (tags.open, tags.close))

    def threshold(self, policy: Adaptive) -> float:
        """Return a policy's threshold. If it sets none, the calibrated one, if there is one."""
        calibrated = (self.calibration or {}).get("threshold")
        return policy.resolved_threshold(None if calibrated is None else float(calibrated))

    @property
    def tags(self) -> ThinkingTags | None:
        """The dial's thinking tags; None if it names none."""
        return ThinkingTags(*self.thinking_tags) if self.thinking_tags else None

    def bind(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Make a tokenizer render prompts as in training; warn if its chat template has changed.

        Args:
            tokenizer: The base's tokenizer. Its chat template gets the adapter's template
                arguments.
        """
        if self.rendering is None or tokenizer.chat_template is None:
            return
        trained, now = self.rendering.get("template"), template_hash(tokenizer)
        if trained != now:
            warnings.warn(
                f"the adapter was trained with another chat template (hash {trained}) than its "
                f"base has now ({now}); what it is asked differs from what it was trained on.",
                stacklevel=3,
            )
        if arguments := self.rendering.get("arguments"):
            bind_template(tokenizer, arguments, bound_thinking(tokenizer))

    def widened(self, lambda_range: tuple[float, float]) -> Self:
        """Return these settings with a range that includes another one too."""
        (low, high), (least, largest) = self.lambda_range, lambda_range
        return replace(self, lambda_range=(min(low, least), max(high, largest)))

    def to_text(self) -> str:
        """Return the file's text: what identifies the folder comes first."""
        values = asdict(self)
        ordered = sorted(fields(self), key=lambda field: field.kw_only is True)
        known = {field.name: values[field.name] for field in ordered}
        for name in self.OPTIONAL:
            if known[name] in (None, False):
                del known[name]
        return json.dumps(known, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the settings of the dial in a folder.

        Raises:
            CheckpointError: If the file is missing, corrupt, or of a later format.
        """
        path = folder / cls.CONFIG_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{folder} holds no {cls.KIND} ({cls.CONFIG_FILE} is missing); give a folder that "
                f"{cls.WRITER} wrote."
            )

        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            version = given.get("format_version")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is corrupt ({error}); copy or save it again.") from error

        # The version comes first: a later format may have other keys.
        if version != cls.FORMAT:
            raise CheckpointError(
                f"{path} has format_version {version!r} and this flexalign reads {cls.FORMAT}; "
                "install the flexalign that wrote it."
            )

        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise CheckpointError(f"{path} has unknown keys: {', '.join(unknown)}.")

        try:
            return cls(**given)
        except (FlexAlignError, TypeError) as error:
            raise CheckpointError(f"{path} is not usable: {error}") from error


def require_base(
    settings: DialConfig,
    found: str,
    name: str,
    folder: str | Path,
    insist: str = ", or insist with --any-base (any_base=True)",
) -> None:
    """Refuse a base that an adapter was not made for.

    Args:
        settings: The adapter's settings.
        found: The base's fingerprint.
        name: The base's name, for the message.
        folder: The adapter's folder, for the message.
        insist: How another base is accepted, for the message; empty where none is.

    Raises:
        PairMismatchError: If the base's fingerprint is not the one in the adapter's settings.
    """
    if settings.base_fingerprint and found != settings.base_fingerprint:
        raise PairMismatchError(
            f"the adapter {folder} was made for {settings.base} (fingerprint "
            f"{settings.base_fingerprint}), and {name} has {found}: other weights. Give its own "
            f"base{insist}."
        )


def require_whole(settings: DialConfig | type[DialConfig], folder: Path) -> None:
    """Check that a dial's weights file is complete, without loading it.

    That of a repository at the hub is fetched, or left there for now (`models.hub.downloads_wait`).

    Raises:
        CheckpointError: If it is missing, truncated or corrupt.
    """
    path = folder / settings.WEIGHTS_FILE
    if not fetch_weights(folder):
        return
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the folder holds no complete {settings.KIND}.")
    try:
        with safe_open(path, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): truncated or corrupt; copy or save it again."
        ) from error
