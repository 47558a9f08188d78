"""One LoRA whose strength is λ: the reference at 0, and the whole dial in one stream.

The names below are imported on first use. Modules that do not need torch can be imported without it.
"""

from typing import TYPE_CHECKING

from flexalign._lazy import lazy_names

if TYPE_CHECKING:
    from flexalign.lora_dial.configuration import LoRADialConfig
    from flexalign.lora_dial.modeling import LoRADial
    from flexalign.lora_dial.scaling import LoRAScale

_HOMES = {
    "LoRADial": "flexalign.lora_dial.modeling",
    "LoRAScale": "flexalign.lora_dial.scaling",
    "LoRADialConfig": "flexalign.lora_dial.configuration",
}

__all__ = ["LoRADial", "LoRADialConfig", "LoRAScale"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
