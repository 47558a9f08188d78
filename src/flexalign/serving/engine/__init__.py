"""The engine that runs on this machine: one model, one thread, requests that come and go.

The library's own forward serves every step; ``runners`` say what it takes for an InRa model, a pair
or a plain model. A ``frame`` is the batch that rows join and leave between steps; a ``row`` is one
answer on its way; the ``scheduler`` is the thread.
"""

from flexalign.serving.engine.batch import InRaRunner, PairRunner, PlainRunner, Runner
from flexalign.serving.engine.jobs import AnswerPiece, Ended, Generation, Job, WrittenToken
from flexalign.serving.engine.scheduler import Engine, EngineLimits

__all__ = [
    "AnswerPiece",
    "Ended",
    "Engine",
    "EngineLimits",
    "Generation",
    "InRaRunner",
    "Job",
    "PairRunner",
    "PlainRunner",
    "Runner",
    "WrittenToken",
]
