"""Equation 5 at decode time over two whole models, and responses."""

from flexalign.generation.responses import Response, generate_responses
from flexalign.generation.two_model import PairCache, TwoModelDecoder

__all__ = ["PairCache", "Response", "TwoModelDecoder", "generate_responses"]
