"""Decoding with equation 5 over two models or two prompts, and generating responses in batches."""

from flexalign.generation.responses import Response, generate_responses
from flexalign.generation.two_model import PairCache, TwoModelDecoder
from flexalign.generation.two_prompts import TwoPromptDecoder

__all__ = ["PairCache", "Response", "TwoModelDecoder", "TwoPromptDecoder", "generate_responses"]
