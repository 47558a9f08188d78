"""The engine that runs on this machine: one model, one thread, continuous batching.

``jobs`` defines its input and output; the ``scheduler`` is the thread; a ``sequence`` is one answer
while it is written, and sequences join and leave the ``batch`` between steps. Every step is the forward
of the library's own models.
"""

from flexalign.serving.engine.batch import (
    InRaRunner,
    LoRARunner,
    PairRunner,
    PlainRunner,
    Runner,
    TwoPromptRunner,
)
from flexalign.serving.engine.grammar import Grammar
from flexalign.serving.engine.jobs import AnswerPiece, Ended, Generation, Job, WrittenToken
from flexalign.serving.engine.scheduler import Engine, EngineLimits

__all__ = [
    "AnswerPiece",
    "Ended",
    "Engine",
    "EngineLimits",
    "Generation",
    "Grammar",
    "InRaRunner",
    "Job",
    "LoRARunner",
    "PairRunner",
    "PlainRunner",
    "Runner",
    "TwoPromptRunner",
    "WrittenToken",
]
