"""What a cache is of, and whether that is what a run needs."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexalign.data.rendering import chat_template_of
from flexalign.errors import ConfigError
from flexalign.trra.output import differences

__all__ = ["identity_of", "require_same"]

_NAMES = {
    "pair": "the pair",
    "data": "the data set",
    "template": "the chat template",
    "max_length": "the cut-off max_length",
    "truncation": "the end that the cut-off keeps",
    "completion_only": "completion_only_loss",
    "assistant_only": "assistant_only_loss",
    "eos_token": "the end token",
    "vocabulary": "the number of tokens",
}


def identity_of(
    pair: tuple[str | None, str | None], data: str, tokenizer: Any, args: Any
) -> dict[str, Any]:
    """Gather everything that decides which hidden states a run needs.

    Args:
        pair: Fingerprints of the reference and the aligned model.
        data: Fingerprint of the data set.
        tokenizer: The pair's.
        args: The run's ``TrRaConfig``.
    """
    template = chat_template_of(tokenizer, args.chat_template_path)
    return {
        "pair": list(pair),
        "data": data,
        "template": _short_hash(template),
        "max_length": args.max_length,
        "truncation": "keep_start" if args.packing else args.truncation_mode,
        "completion_only": args.completion_only_loss,
        "assistant_only": args.assistant_only_loss,
        "eos_token": args.eos_token or tokenizer.eos_token,
        "vocabulary": len(tokenizer),
    }


def require_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Make sure that a cache is of what is wanted.

    Raises:
        ConfigError: If not; names what differs.
    """
    unlike = [
        f"{_NAMES.get(name, name)} ({'; '.join(differences(before.get(name), now[name], name))})"
        for name in now
        if before.get(name) != now[name]
    ]
    if unlike:
        raise ConfigError(
            f"the cache {folder} is of something else: {', '.join(unlike)}; name another "
            "cache_dir, or delete that folder and make it again with flexalign cache."
        )


def _short_hash(template: Any) -> str | None:
    if template is None:
        return None
    text = json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
