"""Systems: models, dials, pairs and servers that answer prompts, through one interface.

::

    model:PATH                   a model as it is
    dial:BASE,ADAPTER            an InRa adapter or a LoRA dial on its base
    lora:BASE,ADAPTER            a PEFT LoRA, scaled by λ
    pair:REF,ALIGNED             two models, fused as they decode
    prompts:MODEL                one model under two prompts, fused as they decode
    interpolate:REF,ALIGNED      weights between two models
    url:http://…                 a server of OpenAI's protocol
    mine=dial:BASE,ADAPTER       any of these under a name of the user's

:func:`sample` samples traces for training from a model or a server.
"""

from typing import TYPE_CHECKING

from flexalign._lazy import lazy_names
from flexalign.systems.open import (
    Answer,
    Backend,
    Failure,
    Messages,
    PromptRequest,
    Request,
    System,
    SystemOptions,
    open_backend,
    parse_system,
    parse_systems,
)

if TYPE_CHECKING:
    from flexalign.systems.conversation import Conversation
    from flexalign.systems.local import LocalBackend
    from flexalign.systems.sampling import sample

_HOMES = {
    "Conversation": "flexalign.systems.conversation",
    "LocalBackend": "flexalign.systems.local",
    "sample": "flexalign.systems.sampling",
}

__all__ = [
    "Answer",
    "Backend",
    "Conversation",
    "Failure",
    "LocalBackend",
    "Messages",
    "PromptRequest",
    "Request",
    "System",
    "SystemOptions",
    "open_backend",
    "parse_system",
    "parse_systems",
    "sample",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
