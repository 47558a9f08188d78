"""Equation 5 at decode time over two whole models, weights between them, and responses."""

from flexalign.decoding.interpolate import interpolate
from flexalign.decoding.responses import Response, generate_responses
from flexalign.decoding.two_model import PairCache, TwoModelDecoder

__all__ = ["PairCache", "Response", "TwoModelDecoder", "generate_responses", "interpolate"]
