"""A LoRA dial on the miniature without training: what leads from its reference to its aligned model.

The LoRA is the difference of their linear layers, cut to its largest singular values. Its λ = 1 is
close to the aligned model, and more λ gives shorter answers, as a trained dial does.
"""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from flexalign.lora_dial import LoRADial, LoRADialConfig
from flexalign.models.loading import fingerprint, load_model

RANK = 48
BASE = "miniature"


@torch.no_grad()
def miniature_lora() -> PeftModel:
    """Return the reference with the LoRA that leads to the aligned model."""
    aligned = dict(load_model("miniature:aligned").named_modules())
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    model = get_peft_model(load_model("miniature:reference"), settings)
    for name, layer in model.get_base_model().named_modules():
        target = aligned.get(name)
        if isinstance(target, nn.Linear) and hasattr(layer, "lora_A"):
            u, s, v = torch.linalg.svd(target.weight - layer.base_layer.weight)
            root = s[:RANK].sqrt()
            layer.lora_A["default"].weight.copy_(root[:, None] * v[:RANK])
            layer.lora_B["default"].weight.copy_(u[:, :RANK] * root)
    return model.eval()


def write_dial(folder: Path, lambda_range: tuple[float, float] = (0.0, 5.0)) -> Path:
    """Write the dial's folder and return it."""
    model = miniature_lora()
    LoRADial(
        model, LoRADialConfig(BASE, fingerprint(model), lambda_range=lambda_range)
    ).save_pretrained(folder)
    return folder
