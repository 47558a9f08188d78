"""Inference-time realignment: a layer adapter, two streams, and a dial between them."""

from flexalign.inra.config import InRaConfig
from flexalign.inra.kv import StreamCache
from flexalign.inra.model import InRaModel
from flexalign.inra.streams import ADAPTER, BASE, BOTH

__all__ = ["ADAPTER", "BASE", "BOTH", "InRaConfig", "InRaModel", "StreamCache"]
