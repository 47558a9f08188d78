"""Settings of a dial that are measured against each other, each with a text id."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexalign.errors import ConfigError
from flexalign.lambdas import Adaptive, Dial, Fixed, Route, parse_dial

# What tables and pictures call things: measured settings, and folders that stand side by side.


def setting_label(setting: str, effort: float | None) -> str:
    """Name a setting by the effort that it was asked for as, with what that means behind it.

    Example:
        >>> setting_label("λ=0.42", 50)
        'effort 50 (λ=0.42)'

    Args:
        setting: Its id.
        effort: None if it was asked for by itself.
    """
    return setting if effort is None else f"effort {effort:g} ({setting})"


def tell_apart(folders: Sequence[Path]) -> list[str]:
    """Return the fewest trailing parts of each path that make all of them differ.

    Example:
        >>> tell_apart([Path("a/out"), Path("b/out")])
        ['a/out', 'b/out']

    Args:
        folders: Resolved, at least one, none twice.
    """
    longest = max(len(folder.parts) for folder in folders)
    for count in range(1, longest + 1):
        labels = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return labels


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        id: How results call it: ``λ=0.5``, ``adaptive 0.5``, ``route 0.3``, a schedule's JSON, or
            ``as it is`` for a system without a dial. The same dial always has the same id.
        dial: What the system is given; None for one without a dial.
        effort: The effort that the dial was asked for as; None if it was asked for by itself.
    """

    id: str
    dial: Dial | None = None
    effort: float | None = None

    @classmethod
    def of(cls, value: object) -> "Setting":
        """Name a dial, given in any of its forms.

        Raises:
            ConfigError: If it is malformed.
            LambdaError: If a λ in it is not a finite number.
        """
        dial = parse_dial(value)
        if isinstance(dial, Fixed):
            return cls(f"λ={dial.lam + 0.0:g}", Fixed(dial.lam + 0.0))  # −0 is 0
        return cls(_name(dial), dial)

    @property
    def label(self) -> str:
        """How tables call it: its id, behind the effort if there is one."""
        return setting_label(self.id, self.effort)

    @property
    def lam(self) -> float | None:
        """λ, if it is one number."""
        return self.dial.lam if isinstance(self.dial, Fixed) else None

    @property
    def policy(self) -> dict[str, Any] | None:
        """The JSON form of a schedule or of a policy that is more than one λ."""
        if self.dial is None or isinstance(self.dial, Fixed):
            return None
        form: Any = self.dial.to_json()
        return dict(form)


AS_IT_IS = Setting("as it is")
"""The one setting of a system without a dial."""


def unique_settings(values: Sequence[object]) -> list[Setting]:
    """Name several dials; those that have a name keep it.

    Raises:
        ConfigError: If two have one id: they are the same, or differ beyond six digits.
    """
    settings = [value if isinstance(value, Setting) else Setting.of(value) for value in values]
    seen: dict[str, Setting] = {}
    for setting in settings:
        first = seen.setdefault(setting.id, setting)
        if first is setting:
            continue
        if first.label == setting.label:
            raise ConfigError(f"the setting {setting.label} is given twice; leave one out.")
        raise ConfigError(
            f"{first.label} and {setting.label} are one and the same setting; leave one out."
        )
    return settings


def _name(dial: Any) -> str:
    form = dial.to_json()
    if isinstance(dial, Adaptive | Route):
        given = {key: value for key, value in form.items() if key != "policy"}
        first = "threshold" if isinstance(dial, Adaptive) else "share"
        words = [form["policy"]]
        if first in given:
            words.append(f"{given.pop(first):g}")
        return " ".join([*words, *(f"{key}={value}" for key, value in given.items())])
    return json.dumps(form, ensure_ascii=False, separators=(", ", ": "))
