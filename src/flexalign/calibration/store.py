"""A calibration in its adapter's file."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import flexalign
from flexalign.evaluation.samples import write_json
from flexalign.inra.config import CONFIG_FILE, InRaConfig
from flexalign.inra.folder import WEIGHTS_FILE

__all__ = ["copy_adapter", "is_packaged", "store_calibration"]


def store_calibration(folder: Path, calibration: Mapping[str, Any]) -> InRaConfig:
    """Write a calibration into an adapter's settings, whose λ range is widened to hold it.

    The file is written beside its place and then moved there: a crash leaves the old one.

    Returns:
        The new settings.

    Raises:
        CheckpointError: If the folder holds no adapter.
    """
    settings = InRaConfig.load(folder)
    least, largest = calibration["lambda_range"]
    low, high = settings.lambda_range
    kept = json.loads(json.dumps(calibration))
    settings = replace(
        settings, calibration=kept, lambda_range=(min(low, least), max(high, largest))
    )
    write_json(folder / CONFIG_FILE, json.loads(settings.to_text()))
    return settings


def is_packaged(folder: Path) -> bool:
    """Whether a folder, by whatever path or link it is named, is a part of this package."""
    return folder.resolve().is_relative_to(Path(flexalign.__file__).resolve().parent)


def copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter's two files to a folder that may be written to."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        shutil.copyfile(source / name, target / name)
