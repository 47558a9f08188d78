"""The engine that runs on this machine: one model, one thread, requests that come and go.

``jobs`` is what it is asked and what it delivers; the ``scheduler`` is the thread; a ``sequence`` is one
answer as it is written, and the ``batch`` is what sequences join and leave between steps. The library's
own forward runs every step.
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
