"""Equation 5 at decode time over two whole models, weights between them, and responses."""

from flexalign.decoding.responses import Response, generate_responses

__all__ = ["Response", "generate_responses"]
