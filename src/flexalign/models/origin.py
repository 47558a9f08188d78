"""What the hub links a trained folder by: the model that it was made from, and that one's licence."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flexalign.errors import FlexAlignError
from flexalign.models.hub import HubName
from flexalign.models.sources import Model, hub_id, resolve

CARD = "README.md"
"""A folder's model card."""

_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """The base of a trained model or adapter, as a card names it.

    Attributes:
        name: The base's name or path, as the user gave it.
        repo: Its id at the hub; None if it is a folder or a known name, which the hub does not link.
        license: The keys ``license``, ``license_name`` and ``license_link`` of its card.
    """

    name: str
    repo: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Model) -> "Origin":
        """Read a base's id and the licence that its card names. Weights are not read."""
        repo = hub_id(base)
        try:
            folder = resolve(base).path
        except FlexAlignError:
            return cls(str(base), repo)
        return cls(str(base), repo, _read_license(folder / CARD, repo))

    def header(self, relation: str, others: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return the keys of a card's header that link to the base; absent where it is not known.

        Args:
            relation: What was made of it: ``finetune``, ``adapter`` or ``merge``, as the hub has it.
            others: Ids of further models that it was made from.
        """
        linked: dict[str, Any] = {}
        if self.repo is not None:
            bases = [self.repo, *others]
            linked["base_model"] = bases[0] if len(bases) == 1 else bases
            linked["base_model_relation"] = relation
        return linked | dict(self.license)

    @property
    def section(self) -> list[str]:
        """The card's section on what is left out of the header; empty if nothing is."""
        told = []
        if self.repo is None:
            told.append(
                f"The base, `{self.name}`, was not named by an id of the hub, so `base_model` is "
                "left out of the header above; add it before you publish this folder."
            )
        if not self.license:
            told.append(
                f"The card of the base, `{self.name}`, names no licence, so `license` is left out; "
                "the licence of the base holds, whichever it is."
            )
        return ["## Where it comes from\n\n" + "\n".join(told)] if told else []


def dataset_ids(data: str) -> list[str]:
    """Return the data's id at the hub, if it is named by one, for the key ``datasets``."""
    name = None if Path(data).exists() else HubName.parse(data)
    return [] if name is None else [name.repo]


def _read_license(card: Path, repo: str | None) -> dict[str, str]:
    from huggingface_hub import ModelCard, constants

    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # there is no card, or its header is no YAML
    found = {name: data.get(name) for name in _LICENSE_KEYS}
    kept = {name: value for name, value in found.items() if isinstance(value, str)}
    link = kept.get("license_link")
    if link is not None and repo is not None and "://" not in link:
        # A link to a file of the base's repository is none of another's.
        kept["license_link"] = f"{constants.ENDPOINT}/{repo}/blob/main/{link}"
    return kept if "license" in kept else {}
