"""The aligned model: a LoRA adapter on the reference that answers concisely."""

from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from flexalign.models.loading import load_model, load_tokenizer


def train_aligned(
    reference: str, rows: list[dict[str, Any]], recipe: Path, output: Path, max_steps: int
) -> None:
    """Fine-tune on prompts with concise answers.

    Writes the adapter to `output` and the plain model to ``output/merged``; the folder appears
    when both are whole.
    """
    transformers.logging.disable_progress_bar()
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    partial = output.with_name(output.name + ".partial")
    tokenizer = load_tokenizer(reference)
    on_device = torch.accelerator.is_available()
    trainer = SFTTrainer(
        load_model(reference),
        args=SFTConfig(
            output_dir=str(partial),
            save_strategy="no",
            report_to="none",
            bf16=on_device,
            dataloader_pin_memory=on_device,
            completion_only_loss=True,
            **{**settings["training"], "max_steps": max_steps},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(**settings["lora"]),
    )
    trainer.train()
    # The known name instead of a path, so that the folder serves on every machine.
    trainer.model.peft_config["default"].base_model_name_or_path = reference
    trainer.model.save_pretrained(partial, save_embedding_layers=False)
    trainer.model.merge_and_unload().save_pretrained(partial / "merged")
    for folder in (partial, partial / "merged"):
        tokenizer.save_pretrained(folder)
    partial.rename(output)
