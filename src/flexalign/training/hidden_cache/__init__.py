"""A cache of both teachers' hidden states, from which students of any λ can be trained.

Equation 5 mixes logits, and logits are the product of a head and a final hidden state. The cache
holds the hidden states at the positions whose next token the loss counts, and the two heads once.
They do not depend on λ, so training from one cache is exact for every λ, schedule, divergence and
gate. One response token takes ``(H_reference + H_aligned) · bytes`` on disk.

``documents`` defines the units of the cache and their keys, and ``format`` its files. ``fill``
writes the files, with any number of processes, which may be killed and started again. ``read`` maps
the files into memory and adds hidden states to the trainer's batches.
"""

from flexalign.training.hidden_cache.documents import prepare_documents
from flexalign.training.hidden_cache.fill import stored_dtype, write_cache
from flexalign.training.hidden_cache.format import Form, hidden_width, identity_of
from flexalign.training.hidden_cache.read import HiddenStateCache

__all__ = [
    "Form",
    "HiddenStateCache",
    "hidden_width",
    "identity_of",
    "prepare_documents",
    "stored_dtype",
    "write_cache",
]
