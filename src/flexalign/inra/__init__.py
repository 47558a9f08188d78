"""Inference-time realignment: a layer adapter, two streams, and a dial between them."""
