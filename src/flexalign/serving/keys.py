"""The keys of a request's body: those that are known, and what becomes of the others.

A key that a server does not know changes nothing, which its sender cannot see: it is refused, or, if
the operator says so, removed and named in the answer's header ``x-flexalign-ignored``.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import BaseModel

from flexalign._spelling import nearest
from flexalign.serving.errors import ApiError

IGNORED = "x-flexalign-ignored"
"""The header that names keys without effect."""

_WITH_KEYS = ("stream_options",)
"""Keys whose values are objects with known keys."""

_LONGEST, _MOST_NAMED = 80, 16


@dataclass(frozen=True)
class BodyKeys:
    """The keys that the bodies of a route may have.

    Attributes:
        fields: Those of the route's form; of them a message suggests the nearest.
        others: Known keys that are not suggested.
        inner: Of a key whose value is an object, the keys that this may have.
        refuses: Whether an unknown key is an error.
    """

    fields: tuple[str, ...]
    others: frozenset[str] = frozenset()
    inner: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refuses: bool = True

    @classmethod
    def of(
        cls, form: type[BaseModel], others: Iterable[str] = (), *, refuses: bool = True
    ) -> "BodyKeys":
        """Read the keys from a route's form.

        Args:
            form: The form of its bodies.
            others: Keys that are known besides.
            refuses: Whether an unknown key is an error.
        """
        inner = {
            key: _names(kind)
            for key in _WITH_KEYS
            if key in form.model_fields
            for kind in _kinds(form.model_fields[key].annotation)
        }
        return cls(_names(form), frozenset(others), inner, refuses)

    def sort_out(self, body: dict[str, Any]) -> tuple[str, ...]:
        """Refuse unknown keys, or remove them from a body.

        A key whose value is null counts as left out.

        Args:
            body: A request's body, without the keys of the dial.

        Returns:
            The removed keys; those inside another with a dot between the two.

        Raises:
            ApiError: If there is one and this server refuses them; the message names the nearest
                known key.
        """
        found = self.unknown(body)
        if found and self.refuses:
            raise self.refusal(*found[0], suggested=self.fields)
        for key, inner in found:
            if inner is None:
                del body[key]
            else:
                body[key] = {name: value for name, value in body[key].items() if name != inner}
        return tuple(key if inner is None else f"{key}.{inner}" for key, inner in found)

    def unknown(self, body: Mapping[str, Any]) -> list[tuple[str, str | None]]:
        """Return the unknown keys of a body, each with the one inside it that is unknown, if it is."""
        found: list[tuple[str, str | None]] = []
        for key, value in body.items():
            if value is None:
                continue
            if key not in self.fields and key not in self.others:
                found.append((key, None))
            elif key in self.inner and isinstance(value, dict):
                inside = self.inner[key]
                found += [(key, name) for name in value if name not in inside]
        return found

    def refusal(self, key: str, inner: str | None, *, suggested: Collection[str]) -> ApiError:
        """Return the error of an unknown key.

        Args:
            key: The key.
            inner: The unknown key inside its value, if it is that.
            suggested: Known keys, of which the message names the nearest.
        """
        if inner is not None:
            name = f"{key}.{inner[:_LONGEST]}"
            hint = nearest(inner[:_LONGEST], self.inner[key], prefix=f"{key}.")
        else:
            name = key = key[:_LONGEST]
            hint = nearest(key, suggested, otherwise="leave it out")
        message = f"{name!r} is not known to this server{hint}"
        return ApiError(400, message, param=key, code="invalid_value")


def ignored_value(names: Sequence[str]) -> str:
    """Return the value of :data:`IGNORED`: keys of a body, which may hold any text, in plain ASCII."""
    shown = []
    for name in names[:_MOST_NAMED]:
        plain = (letter if "!" <= letter <= "~" and letter != "," else "?" for letter in name)
        shown.append("".join(plain)[:_LONGEST] or "?")
    left = len(names) - len(shown)
    return ", ".join([*shown, f"and {left} more"] if left else shown)


def _names(form: type[BaseModel]) -> tuple[str, ...]:
    """Return the names of a form's fields, with their aliases."""
    aliases = [one.alias for one in form.model_fields.values() if one.alias is not None]
    return (*form.model_fields, *aliases)


def _kinds(annotation: Any) -> list[type[BaseModel]]:
    """Return the forms that a field's value may have."""
    kinds = get_args(annotation) or (annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
