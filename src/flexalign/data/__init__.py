"""Reading of data formats into TRL's form, rendering, thinking tags, and sampling of traces."""

from flexalign.data.formats import data_fingerprint, load_preferences, load_prompts, load_traces
from flexalign.data.logits import LogitsSettings
from flexalign.data.rendering import Lengths, measure_lengths, split_tokens
from flexalign.data.thinking import ThinkingTags, strip_thinking
from flexalign.data.traces import SamplingSettings, make_traces, open_run

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
