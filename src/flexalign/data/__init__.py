"""Reading of data formats into TRL's form, rendering, thinking tags, and sampling of traces.

The names below are imported on first use, because some of them need the library ``datasets``.
"""

from typing import TYPE_CHECKING

from flexalign._lazy import lazy_names

if TYPE_CHECKING:
    from flexalign.data.formats import data_fingerprint, load_preferences, load_prompts, load_traces
    from flexalign.data.logits import LogitsSettings
    from flexalign.data.rendering import Lengths, measure_lengths, split_tokens
    from flexalign.data.thinking import ThinkingTags, strip_thinking
    from flexalign.data.traces import SamplingSettings, make_traces, open_run

_HOMES = {
    "Lengths": "flexalign.data.rendering",
    "LogitsSettings": "flexalign.data.logits",
    "SamplingSettings": "flexalign.data.traces",
    "ThinkingTags": "flexalign.data.thinking",
    "data_fingerprint": "flexalign.data.formats",
    "load_preferences": "flexalign.data.formats",
    "load_prompts": "flexalign.data.formats",
    "load_traces": "flexalign.data.formats",
    "make_traces": "flexalign.data.traces",
    "measure_lengths": "flexalign.data.rendering",
    "open_run": "flexalign.data.traces",
    "split_tokens": "flexalign.data.rendering",
    "strip_thinking": "flexalign.data.thinking",
}

__all__ = [
    "Lengths",
    "LogitsSettings",
    "SamplingSettings",
    "ThinkingTags",
    "data_fingerprint",
    "load_preferences",
    "load_prompts",
    "load_traces",
    "make_traces",
    "measure_lengths",
    "open_run",
    "split_tokens",
    "strip_thinking",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
