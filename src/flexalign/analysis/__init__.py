"""What a pair differs in, and what a λ will do, shown before anything is trained.

Both read traces that are there: :mod:`flexalign.analysis.difference` compares the two models and
proposes a gate, :mod:`flexalign.analysis.preview` shows what the teacher would do at each λ.
"""
