"""Systems that can be evaluated, as the command line names them.

::

    model:PATH                   a model as it is
    dial:BASE,ADAPTER            an InRa adapter on its base
    pair:REF,ALIGNED             two models, fused as they decode
    interpolate:REF,ALIGNED      weights between two models
    url:http://…                 a server of OpenAI's protocol
    mine=dial:BASE,ADAPTER       any of these under a name of the user's
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from flexalign.errors import ConfigError
from flexalign.evaluation.systems.backend import (
    Answer,
    Backend,
    Cell,
    Failure,
    Key,
    Messages,
    Outcome,
    SystemOptions,
)
from flexalign.evaluation.systems.settings import AS_IT_IS, Setting, unique_settings
from flexalign.lambdas import Fixed

__all__ = [
    "AS_IT_IS",
    "Answer",
    "Backend",
    "Cell",
    "Failure",
    "Key",
    "Messages",
    "Outcome",
    "Setting",
    "System",
    "SystemOptions",
    "open_backend",
    "parse_system",
    "parse_systems",
    "settings_of",
    "unique_settings",
]

_FORM = re.compile(r"(?:(?P<name>[^:,]+)=)?(?P<kind>model|dial|pair|interpolate|url):(?P<rest>.+)")
_PARTS = {"model": 1, "dial": 2, "pair": 2, "interpolate": 2, "url": 1}
_MINIATURE = {
    "dial": ("miniature", "miniature:fast"),
    "pair": ("miniature", "miniature:aligned"),
    "interpolate": ("miniature", "miniature:aligned"),
}
_DEFAULT_LAMBDAS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class System:
    """One system.

    Attributes:
        name: What results call it.
        kind: ``model``, ``dial``, ``pair``, ``interpolate`` or ``url``.
        parts: Its models, or its address.
    """

    name: str
    kind: str
    parts: tuple[str, ...]


def parse_system(text: str) -> System:
    """Read a system as the command line takes it.

    Example:
        >>> parse_system("mine=dial:miniature,miniature:fast")
        System(name='mine', kind='dial', parts=('miniature', 'miniature:fast'))

    Raises:
        ConfigError: If it is none.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"{text!r} is no system; write model:PATH, dial:BASE,ADAPTER, pair:REF,ALIGNED, "
            "interpolate:REF,ALIGNED or url:http://…, with name= in front if you like"
            + (f" (such as model:{text})." if ":" not in text else ".")
        )
    kind, rest = match["kind"], match["rest"]
    parts = (rest,) if _PARTS[kind] == 1 else tuple(part.strip() for part in rest.split(","))
    if parts == ("miniature",) and kind in _MINIATURE:
        parts = _MINIATURE[kind]
    if len(parts) != _PARTS[kind] or not all(parts):
        raise ConfigError(
            f"{text!r}: {kind} takes {_PARTS[kind]} models with a comma between, got {len(parts)}."
        )
    short = ",".join(parts if kind == "url" else [PurePath(part).name or part for part in parts])
    return System(match["name"] or f"{kind}:{short}", kind, parts)


def parse_systems(texts: Sequence[str]) -> list[System]:
    """Read several systems, each of which needs a name of its own.

    Raises:
        ConfigError: If one is none, or two have one name.
    """
    systems = [parse_system(text) for text in texts]
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two systems are called {name!r}; put a name in front, such as first={texts[0]}."
            )
    return systems


def settings_of(system: System, asked: Sequence[Setting]) -> list[Setting]:
    """Choose the settings that a system can be asked at.

    A model has none but itself. Weights are interpolated at one number. Where nothing is asked a
    dial on this machine is measured at λ = 0, 0.5 and 1, and a server as it is.
    """
    if system.kind == "model" or (system.kind == "url" and not asked):
        return [AS_IT_IS]
    settings = list(asked) or unique_settings(_DEFAULT_LAMBDAS)
    if system.kind == "interpolate":
        return [setting for setting in settings if isinstance(setting.dial, Fixed)]
    return settings


def open_backend(system: System, settings: Sequence[Setting], options: SystemOptions) -> Backend:
    """Prepare a system; weights are loaded with its first sample.

    Raises:
        ConfigError: If a part is not there, or the engine does not serve its kind.
        LambdaError: If a λ is outside an adapter's range.
    """
    if system.kind == "url":
        from flexalign.evaluation.systems.endpoint import EndpointBackend

        return EndpointBackend(system.parts[0], options)
    if options.engine == "vllm":
        if system.kind != "model":
            raise ConfigError(
                f"{system.name}: --engine vllm runs plain models (model:PATH) alone; leave it out, "
                "or serve the dial and give url:http://…."
            )
        from flexalign.evaluation.systems.vllm import VllmBackend

        return VllmBackend(system.parts[0], options)
    from flexalign.evaluation.systems.local import LocalBackend

    return LocalBackend(system.kind, system.parts, settings, options)
