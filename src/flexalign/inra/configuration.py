"""An InRa adapter's folder: ``inra_config.json`` and ``inra_adapter.safetensors``.

:class:`InRaConfig` is the content of the first file. The functions below it write, read and check
the folder. The files do not have PEFT's names, because ``AutoModel.from_pretrained`` would then
load the folder as LoRA.
"""

import json
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexalign._storage import replacing
from flexalign.data.template import bind_template, bound_thinking, template_hash
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import (
    CheckpointError,
    ConfigError,
    FlexAlignError,
    LambdaError,
    PairMismatchError,
)
from flexalign.lambdas import Adaptive, finite_lambda

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_FILE = "inra_config.json"
WEIGHTS_FILE = "inra_adapter.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class InRaConfig:
    """An adapter's settings. Change them with ``dataclasses.replace``, or edit the file.

    Attributes:
        base: Name or path of the base model that the adapter was made for.
        base_fingerprint: The base's fingerprint (``flexalign.models.loading.fingerprint``).
        adapter_layers: Number of layers in the adapter.
        default_lambda: λ of a request that gives none.
        lambda_range: The least and the largest λ that the command line and the server accept. The
            library accepts any finite λ, and warns once if it is outside the range.
        thinking_tags: The opening and the closing tag around the model's thinking. None: the tags
            that the tokenizer defines.
        calibration: The results of calibration, or None.
        rendering: How prompts were rendered in training: `template`, the chat template's hash;
            `arguments`, the template arguments; and `system`, the system message of conversations
            without one, if there was one. None if that is not known.
        format_version: Version of the folder's format.

    Raises:
        ConfigError: If a value is malformed.
        LambdaError: If a λ is not finite, or the range is empty.
    """

    base: str
    base_fingerprint: str
    adapter_layers: int = 1
    default_lambda: float = 0.0
    lambda_range: tuple[float, float] = (0.0, 1.0)
    thinking_tags: tuple[str, str] | None = None
    calibration: dict[str, Any] | None = None
    rendering: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("base", "base_fingerprint"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a text, got {getattr(self, name)!r}.")

        layers = self.adapter_layers
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
            raise ConfigError(f"adapter_layers must be a whole number ≥ 1, got {layers!r}.")

        default = finite_lambda(self.default_lambda, "default_lambda")
        object.__setattr__(self, "default_lambda", default)

        limits = self.lambda_range
        if not isinstance(limits, list | tuple) or len(limits) != 2:
            raise ConfigError(f"lambda_range must be [least, largest], got {limits!r}.")
        low, high = (finite_lambda(limit, "lambda_range") for limit in limits)
        if low > high:
            raise LambdaError(f"lambda_range must be [least, largest], got [{low:g}, {high:g}].")
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
        """The adapter's thinking tags; None if it names none."""
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

    def to_text(self) -> str:
        """Return the file's text."""
        known = {key: value for key, value in asdict(self).items() if key != "rendering"}
        known |= {"rendering": self.rendering} if self.rendering is not None else {}
        return json.dumps(known, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, folder: Path) -> "InRaConfig":
        """Read the settings of the adapter in a folder.

        Raises:
            CheckpointError: If the file is missing, corrupt, or of a later format.
        """
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{folder} holds no InRa adapter ({CONFIG_FILE} is missing); give a folder that "
                "InRaModel.save_pretrained or flexalign adapt wrote."
            )

        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            version = given.get("format_version")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is corrupt ({error}); copy or save it again.") from error

        # The version comes first: a later format may have other keys.
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format_version {version!r} and this flexalign reads {FORMAT_VERSION}; "
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


def save_adapter(adapter: nn.Module, settings: InRaConfig, folder: Path) -> None:
    """Write an adapter's folder. Each file is written under a temporary name and then renamed.

    Args:
        adapter: The adapter's layers.
        settings: The adapter's settings.
        folder: The folder; created if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in adapter.state_dict().items()}

    # Both files are complete before either is renamed.
    with replacing(folder / CONFIG_FILE) as config, replacing(folder / WEIGHTS_FILE) as weights:
        save_file(tensors, weights, metadata={"format": "pt"})
        config.write_text(settings.to_text(), encoding="utf-8")


def check_folder(folder: Path) -> InRaConfig:
    """Read an adapter's settings and check that its weights file is complete, without loading it.

    Raises:
        CheckpointError: If a file is missing, truncated or corrupt.
    """
    settings = InRaConfig.load(folder)
    _require_whole(folder / WEIGHTS_FILE)
    return settings


def load_weights(adapter: nn.Module, folder: Path) -> None:
    """Load an adapter's weights from its folder.

    Raises:
        CheckpointError: If the file is missing, truncated or corrupt, or holds other tensors.
    """
    path = folder / WEIGHTS_FILE
    _require_whole(path)

    weights = load_file(path)
    expected = adapter.state_dict()
    keys = expected.keys() | weights.keys()
    wrong = sorted(key for key in keys if _shape(expected, key) != _shape(weights, key))
    if wrong:
        raise CheckpointError(
            f"{path} does not fit this base: {len(wrong)} tensors are missing, unknown or of "
            f"another shape, the first of them {wrong[0]!r} (here {_shape(weights, wrong[0])}, in "
            f"the base {_shape(expected, wrong[0])})."
        )

    adapter.load_state_dict(weights)


def require_base(settings: InRaConfig, found: str, name: str, folder: Path) -> None:
    """Refuse a base that an adapter was not made for.

    Args:
        settings: The adapter's settings.
        found: The base's fingerprint.
        name: The base's name, for the message.
        folder: The adapter's folder, for the message.

    Raises:
        PairMismatchError: If the base's fingerprint is not the one in the adapter's settings.
    """
    if found != settings.base_fingerprint:
        raise PairMismatchError(
            f"the adapter {folder} was made for {settings.base} (fingerprint "
            f"{settings.base_fingerprint}), and {name} has {found}: other weights. Give its own "
            "base, or insist with --any-base (any_base=True)."
        )


def _require_whole(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the folder holds no complete InRa adapter.")
    try:
        with safe_open(path, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): truncated or corrupt; copy or save it again."
        ) from error


def _shape(tensors: dict[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(tensors[key].shape) if key in tensors else None
