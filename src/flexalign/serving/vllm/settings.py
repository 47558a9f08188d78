"""What a prepared folder's ``config.json`` tells the engine of its dial."""

from dataclasses import asdict, dataclass
from typing import Any

from flexalign.errors import ConfigError

__all__ = ["ARCHITECTURES", "CONFIG_KEY", "DialSettings"]

CONFIG_KEY = "flexalign"
"""The key of ``config.json`` under which the settings stand."""

ARCHITECTURES = {
    "llama": "InRaLlamaForCausalLM",
    "mistral": "InRaMistralForCausalLM",
    "qwen2": "InRaQwen2ForCausalLM",
    "qwen3": "InRaQwen3ForCausalLM",
}
"""The class of ``flexalign.serving.vllm.models`` that serves a family, by its ``model_type``."""


@dataclass(frozen=True)
class DialSettings:
    """An adapter's settings, as far as the engine needs them.

    Attributes:
        adapter_layers: Number of layers in the adapter.
        default_lambda: λ where a request gives none.
        thinking_tokens: The tokens that open and close the thinking; None where the tags are not
            one token each, so that schedules that follow the thinking are refused.
    """

    adapter_layers: int = 1
    default_lambda: float = 0.0
    thinking_tokens: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what stands under the key."""
        return asdict(self)

    @classmethod
    def of(cls, config: Any) -> "DialSettings":
        """Read the settings from a model's configuration.

        Raises:
            ConfigError: If it has none.
        """
        given = getattr(config, CONFIG_KEY, None)
        if not isinstance(given, dict):
            raise ConfigError(
                f"config.json has no {CONFIG_KEY!r} key, so that it is no folder for a dial; make "
                "one with flexalign.serving.vllm.folder.prepare_folder."
            )
        tokens = given["thinking_tokens"]
        return cls(
            given["adapter_layers"], given["default_lambda"], tuple(tokens) if tokens else None
        )
