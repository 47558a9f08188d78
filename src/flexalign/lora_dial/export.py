"""A LoRA dial at chosen strengths, as plain PEFT adapters for any engine that serves LoRA.

The adapter of λ is the dial's own with every B matrix times λ; A matrices and PEFT's settings stay
as they are, so that what reads the one reads the other.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from flexalign._storage import replacing, write_json
from flexalign.errors import ConfigError, UnsupportedModelError
from flexalign.lambdas import Fixed, finite_lambda, require_range
from flexalign.lora_dial.configuration import ADAPTER_FILE, LoRADialConfig, check_folder
from flexalign.models.hub import require_weights
from flexalign.models.sources import INRA_FILE, absolute_name, read_json, resolve_adapter
from flexalign.models.weights import write_tensors

_MATRICES = (".lora_A.weight", ".lora_B.weight")
_TOKENIZER_FILES = (
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "vocab",
    "merges",
)


@dataclass(frozen=True)
class LoRAExport:
    """What is written, or would be.

    Attributes:
        output: The folder.
        adapters: The folder of each λ, inside it.
        size: Bytes of all adapters together, about.
    """

    output: Path
    adapters: dict[float, Path]
    size: int

    def to_json(self) -> dict[str, Any]:
        """Return it as the command line prints it."""
        adapters = [{"lambda": lam, "path": str(path)} for lam, path in self.adapters.items()]
        return {"format": "lora", "output": str(self.output), "adapters": adapters}


def export_lora(
    adapter: str | Path,
    lams: Sequence[float],
    output: str | Path,
    *,
    lambda_range: tuple[float, float] | None = None,
    dry_run: bool = False,
) -> LoRAExport:
    """Write a LoRA dial at several strengths, each as a plain PEFT adapter in ``lambda=0.5/``.

    B times λ is computed in float32 and stored in its own data type. Nothing appears under the
    output's name before all of it is written.

    Args:
        adapter: The dial's folder, or a known name. A plain PEFT LoRA has λ = 0 and λ = 1.
        lams: The strengths.
        output: The folder to write; it must not exist, or must be empty.
        lambda_range: λ to permit; the dial's own range if not given.
        dry_run: Check everything and write nothing.

    Returns:
        Where each adapter is.

    Raises:
        CheckpointError: If the folder holds no dial, or a file is missing, truncated or corrupt.
        ConfigError: If the output is not empty, or there is no λ, or one is named twice.
        LambdaError: If a λ is not finite, or outside the range.
        UnsupportedModelError: If the folder holds an InRa adapter, or the adapter's effect is not
            linear in its strength.
    """
    folder, output = resolve_adapter(adapter), Path(output).expanduser()
    if (folder / INRA_FILE).is_file():
        raise UnsupportedModelError(
            f"{folder} holds an InRa adapter, whose dial is a second stream and no LoRA; bake one λ "
            "of it into a plain model (flexalign bake), or serve it (flexalign serve)."
        )
    settings = check_folder(folder)
    names = _names(lams)
    require_range(
        lambda_range or settings.lambda_range,
        [(f"λ={lam:g}", Fixed(lam)) for lam in names],
        str(folder),
        "give --lambda-range LEAST,LARGEST",
    )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there already; move it away or name another output.")

    require_weights(folder)
    weights = folder / LoRADialConfig.WEIGHTS_FILE
    tensors = load_file(weights)
    unknown = sorted(name for name in tensors if not name.endswith(_MATRICES))
    if unknown:
        raise UnsupportedModelError(
            f"{weights} has {unknown[0]}, which is no matrix of a LoRA on a linear layer; leave its "
            "module out of target_modules."
        )

    export = LoRAExport(
        output,
        {lam: output / name for lam, name in names.items()},
        weights.stat().st_size * len(names),
    )
    if dry_run:
        return export
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as partial:
        partial.mkdir()
        for lam, name in names.items():
            _write(folder, tensors, lam, partial / name)
    return export


def _names(lams: Sequence[float]) -> dict[float, str]:
    """Return the name of each λ's folder.

    Raises:
        ConfigError: If there is no λ, or two have one name.
    """
    names: dict[float, str] = {}
    for lam in lams:
        value = finite_lambda(lam, "λ") + 0.0  # −0 is 0
        name = f"lambda={value:g}"
        if name in names.values():
            raise ConfigError(f"λ={value:g} is there twice; name each λ once, with up to 6 digits.")
        names[value] = name
    if not names:
        raise ConfigError("no λ is given; name the strengths to write, such as 0.5,1,2.")
    return names


def _write(folder: Path, tensors: dict[str, torch.Tensor], lam: float, output: Path) -> None:
    """Write the adapter of one λ."""
    output.mkdir()
    scaled = {
        name: tensor if name.endswith(_MATRICES[0]) else (tensor.float() * lam).to(tensor.dtype)
        for name, tensor in tensors.items()
    }
    write_tensors(output / LoRADialConfig.WEIGHTS_FILE, scaled)
    for file in sorted(folder.iterdir()):
        if file.name == ADAPTER_FILE or file.name.startswith(_TOKENIZER_FILES):
            shutil.copyfile(file, output / file.name)

    settings = read_json(folder / ADAPTER_FILE)
    base = str(settings.get("base_model_name_or_path") or "")
    if base and base != absolute_name(base):
        named = {"base_model_name_or_path": absolute_name(base)}
        write_json(output / ADAPTER_FILE, settings | named)
