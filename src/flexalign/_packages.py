"""Packages that flexalign can do without: what needs one says so, before it does anything."""

import importlib.util

from flexalign.errors import ConfigError


def require_packages(purpose: str, *modules: str, install: str) -> None:
    """Make sure that modules of other packages are there, without importing them.

    Args:
        purpose: What needs them, as a sentence begins: ``"serving"``.
        modules: Their names.
        install: What ``pip install`` is to be given, and anything else to be said.

    Raises:
        ConfigError: If one is missing; names it, and says how to get it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{purpose} needs {', '.join(missing)}; install it with: pip install {install}"
        )
