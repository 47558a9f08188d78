"""Optional packages: code that needs one checks for it first."""

import importlib.util

from flexalign.errors import ConfigError


def require_packages(purpose: str, *modules: str, install: str) -> None:
    """Require modules of optional packages, without importing them.

    Args:
        purpose: The feature that needs them, as the beginning of a sentence: ``"serving"``.
        modules: Their names.
        install: The arguments of ``pip install``, and further advice.

    Raises:
        ConfigError: If one is missing; its message names it and how to install it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{purpose} needs {', '.join(missing)}; install it with: pip install {install}"
        )
