"""Both teachers' hidden states, computed once: from one cache a student of any λ is trained.

Equation 5 mixes logits, and logits are a head's product with a final hidden state. What is kept is
those hidden states at the positions whose next token the loss counts, and the two heads, once;
no λ has gone into them, so every λ, schedule, divergence and gate trains from them exactly. One
response token takes ``(H_reference + H_aligned) · bytes`` on disk.

``documents`` says what is kept of a row and under which key, ``format`` what one file is, ``fill``
makes the files (any number of processes, killed and started again), and ``read`` maps them into
memory and hands them to the trainer batch by batch.
"""

from flexalign.training.hidden_cache.documents import prepare_documents
from flexalign.training.hidden_cache.fill import stored_dtype, write_cache
from flexalign.training.hidden_cache.format import Form, free_bytes, hidden_width, identity_of
from flexalign.training.hidden_cache.read import HiddenStateCache

__all__ = [
    "Form",
    "HiddenStateCache",
    "free_bytes",
    "hidden_width",
    "identity_of",
    "prepare_documents",
    "stored_dtype",
    "write_cache",
]
