"""Decoding with equation 5 over two models, and generating responses in batches."""

from flexalign.generation.responses import Response, generate_responses
from flexalign.generation.two_model import PairCache, TwoModelDecoder

__all__ = ["PairCache", "Response", "TwoModelDecoder", "generate_responses"]
