"""The difference of a pair's models, and the effect of λ, measured before any training.

Both modules score given traces. :mod:`flexalign.analysis.difference` compares the two models and
proposes a gate. :mod:`flexalign.analysis.preview` measures the fused teacher at each λ.
"""
