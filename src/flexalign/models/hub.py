"""Models, adapters and dials at the Hugging Face Hub, by ``org/name`` or ``org/name@revision``.

A repository is fetched in two steps into huggingface_hub's own cache. `locate` fetches what is small
(configuration, tokenizer, card) and returns the snapshot's folder. `fetch_weights` fetches the
weights of such a folder; whatever reads weights calls it first. Inside `downloads_wait` the weights
stay at the hub and are noted, so that everything else can be checked before.

With ``HF_HUB_OFFLINE`` the hub is asked nothing, and a snapshot in the cache is used.
"""

import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from flexalign.errors import ConfigError, WeightsWaitError

_FORM = re.compile(r"(?P<repo>\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b)(?:@(?P<revision>[^\s@]+))?", re.A)
"""As ``huggingface_hub.utils.validate_repo_id`` has it, with an organisation, and a revision."""

_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "*.py")
_NESTED = tuple(f"*/{name}" for name in _SMALL if name != "*.jinja")
"""Small files in folders of a repository: other formats of the model, which are not read."""

_INRA = "inra_adapter.safetensors"
_PICKLES = ("pytorch_model*.bin", "adapter_model*.bin")

Checked = TypeVar("Checked")


@dataclass(frozen=True)
class HubName:
    """A repository at the hub.

    Attributes:
        repo: ``org/name``.
        revision: A branch, a tag or a commit; None for the main branch.
    """

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubName | None":
        """Read a name; None if it does not have the form of one.

        Example:
            >>> HubName.parse("Qwen/Qwen3-0.6B@main")
            HubName(repo='Qwen/Qwen3-0.6B', revision='main')
            >>> HubName.parse("./models/base") is None
            True
        """
        match = _FORM.fullmatch(text)
        if match is None or "--" in match["repo"] or ".." in match["repo"]:
            return None
        return None if match["repo"].endswith(".git") else cls(match["repo"], match["revision"])

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


# What is small, and where a snapshot is. A process asks the hub once for each name.

_located: dict[HubName, Path] = {}
_names: dict[Path, HubName] = {}


def locate(name: HubName, kind: str = "model") -> Path:
    """Return the folder of a repository's snapshot, with its small files.

    Args:
        name: The repository.
        kind: What it is looked up as, for messages: ``model`` or ``adapter``.

    Raises:
        ConfigError: If the hub has no such repository or revision, access to it is not granted, or
            the hub cannot be reached and its cache does not have it.
    """
    if name not in _located:
        folder = _download(name, name.revision, kind, _SMALL, _NESTED)
        _located[name] = folder
        _names.setdefault(folder, name)
    return _located[name]


def name_of(folder: Path) -> HubName | None:
    """Return the name under which a snapshot's folder was located; None for any other folder."""
    return _names.get(folder)


# The weights.


@dataclass
class Downloads:
    """Weights that were left at the hub.

    Attributes:
        sizes: Their bytes, by repository.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    _folders: dict[Path, bool] = field(default_factory=dict)

    def add(self, folder: Path, name: HubName, size: int, *, pickled: bool) -> None:
        """Note the weights of a snapshot's folder."""
        self.sizes[str(name)] = size
        self._folders[folder] = pickled or self._folders.get(folder, False)

    def fetch(self) -> None:
        """Fetch all of them; raises as `locate` does."""
        for folder, pickled in self._folders.items():
            fetch_weights(folder, pickled=pickled)

    @property
    def text(self) -> str:
        """The repositories with their sizes."""
        return describe_sizes(self.sizes)


def as_size(size: int) -> str:
    """Write a number of bytes.

    Example:
        >>> as_size(3 * 2**30)
        '3 GiB'
    """
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """Write bytes by repository."""
    return ", ".join(f"{name} ({as_size(size)})" for name, size in sizes.items())


_waiting: ContextVar[Downloads | None] = ContextVar("waiting", default=None)


@contextmanager
def downloads_wait() -> Iterator[Downloads]:
    """Leave weights at the hub inside the block; yield what notes them."""
    found = Downloads()
    token = _waiting.set(found)
    try:
        yield found
    finally:
        _waiting.reset(token)


def is_waiting() -> bool:
    """Return whether weights are left at the hub now, and some are needed."""
    noted = _waiting.get()
    return noted is not None and bool(noted.sizes)


def fetch_weights(folder: Path, *, pickled: bool = False) -> bool:
    """Fetch the weights of a snapshot's folder, if it is one and they are not there.

    Args:
        folder: Any folder. One that `locate` did not return is left as it is.
        pickled: Fetch pickled weights of a repository that has no others.

    Returns:
        False if they are not there, because `downloads_wait` leaves them at the hub.

    Raises:
        ConfigError: As in `locate`.
    """
    name = _names.get(folder)
    if name is None:
        return True
    missing = {
        file: size
        for file, size in _weight_sizes(name, folder, pickled=pickled).items()
        if not (folder / file).is_file()
    }
    if not missing:
        return True

    noted = _waiting.get()
    if noted is not None:
        noted.add(folder, name, sum(missing.values()), pickled=pickled)
        return False
    size = as_size(sum(missing.values()))
    print(f"note: downloading {name}, {size}, into the hub's cache.", file=sys.stderr)
    _download(name, folder.name, "model", tuple(missing))
    return True


def note_weights(folder: Path) -> None:
    """Note, inside `downloads_wait`, the weights of a snapshot's folder, which will be needed."""
    if _waiting.get() is not None:
        fetch_weights(folder)


def require_weights(folder: Path) -> None:
    """Fetch the weights of a snapshot's folder, as `fetch_weights` does.

    Raises:
        WeightsWaitError: If `downloads_wait` leaves them at the hub.
        ConfigError: As in `locate`.
    """
    if not fetch_weights(folder):
        name, noted = _names[folder], _waiting.get()
        size = as_size(noted.sizes[str(name)]) if noted is not None else ""
        raise WeightsWaitError(
            f"the weights of {name} ({size}) are not downloaded yet, and what was asked for needs "
            f"them; leave --dry-run out, or fetch them first: {_command(name)}."
        )


def pickled_weights(folder: Path) -> list[str]:
    """Return the names of the pickled weights of a snapshot's repository, if it has no others."""
    name = _names.get(folder)
    return [] if name is None else sorted(_weight_sizes(name, folder, pickled=True, safe=False))


def check_before_download(check: Callable[[], Checked]) -> Checked:
    """Check what needs no weights, then fetch the weights, then check again with them.

    Inside `downloads_wait` it checks once, and fetches nothing.

    Args:
        check: Checks, and returns what it has read.

    Raises:
        ConfigError: As in `locate`.
    """
    if _waiting.get() is not None:
        return check()
    with downloads_wait() as waiting, suppress(WeightsWaitError):
        checked = check()
    if not waiting.sizes:
        return checked
    waiting.fetch()
    return check()


def _weight_sizes(
    name: HubName, folder: Path, *, pickled: bool, safe: bool = True
) -> dict[str, int]:
    """Return the weight files of a snapshot's repository and their bytes.

    Args:
        name: The repository.
        folder: The snapshot's folder, which has the name of its commit.
        pickled: Pickled ones, if there are no others.
        safe: Those in safetensors.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(name.repo, revision=folder.name)
    except CachedRepoTreeNotFoundError:
        return {}  # an older snapshot, offline: what is there is all that is known
    sizes = {file.path: file.size for file in tree if "/" not in file.path}
    found = {file: sizes[file] for file in _safe_files(sizes, folder)}
    if found or not pickled:
        return found if safe else {}
    return {file: sizes[file] for file in sizes if any(fnmatch(file, one) for one in _PICKLES)}


def _safe_files(files: Collection[str], folder: Path) -> list[str]:
    """Return those of a repository's files that are weights which `flexalign.models.weights` reads.

    Others are the same weights in another precision or another layout.
    """
    found = [_INRA] if _INRA in files else []
    for stem in ("model", "adapter_model"):
        whole, index = (f"{stem}.safetensors{end}" for end in ("", ".index.json"))
        if whole in files:
            found.append(whole)
        elif index in files:
            try:
                shards = set(json.loads((folder / index).read_text("utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, AttributeError, TypeError):
                continue  # what reads the index says what is wrong with it
            found += sorted(shards & set(files))
    return found


# Errors of the hub, each as one sentence.


def _download(
    name: HubName,
    revision: str | None,
    kind: str,
    allowed: tuple[str, ...],
    ignored: tuple[str, ...] = (),
) -> Path:
    """Fetch files of a repository into the hub's cache; return the snapshot's folder."""
    from huggingface_hub import errors, is_offline_mode, snapshot_download

    try:
        return Path(
            snapshot_download(
                name.repo,
                revision=revision,
                allow_patterns=list(allowed),
                ignore_patterns=list(ignored),
                library_name="flexalign",
                tqdm_class=_no_progress() if allowed == _SMALL else None,
            )
        )
    except errors.IncompleteSnapshotError as error:
        # The small files that a model has are there, or what reads them says which is missing.
        if allowed == _SMALL:
            return Path(error.snapshot_path)
        reason = f"its weights are not whole in the hub's cache, and {_why_not(error)}"
        raise ConfigError(f"{name}: {reason}: {_command(name)}.") from error
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{name} is gated, and access is not granted to you; ask for it at "
            f"{_endpoint()}/{name.repo}, then log in with: hf auth login (or set HF_TOKEN)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"there is no {kind} {str(name)!r}: it is no folder here, and the hub ({_endpoint()}) "
            "has no repository of this name that you may read; check the name, or, if it is "
            "private, log in with: hf auth login (or set HF_TOKEN)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(
            f"{name}: the repository {name.repo} has no revision {name.revision!r}; name one of its "
            "branches, tags or commits."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if is_offline_mode():
            raise ConfigError(
                f"there is no {kind} {str(name)!r}: it is no folder here, and not in the hub's "
                "cache, which alone is read while HF_HUB_OFFLINE is set; unset it, or fetch the "
                f"{kind} first: {_command(name)}."
            ) from error
        raise _unreachable(name, kind, error.__cause__ or error) from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # httpx's own
        raise _unreachable(name, kind, error) from error
    except OSError as error:
        raise ConfigError(
            f"{name} cannot be written to the hub's cache ({error.strerror or error}); make room "
            "there, or set HF_HOME to another folder."
        ) from error


def _no_progress() -> type[Any]:
    """Return a progress bar that is not shown, for what takes a moment."""
    from huggingface_hub import utils

    shown: Any = utils.tqdm  # type: ignore[attr-defined]

    class NoProgress(shown):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return NoProgress


def _why_not(error: BaseException) -> str:
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set; unset it, or fetch them where there is a network"
    return f"{_endpoint()} cannot be reached ({in_one_line(error.__cause__ or error)}); fetch them later"


def _unreachable(name: HubName, kind: str, error: BaseException) -> ConfigError:
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        return ConfigError(
            f"{name}: the hub ({_endpoint()}) does not know your token; log in anew with: hf auth "
            "login --force (or mend HF_TOKEN, which goes before it)."
        )
    return ConfigError(
        f"there is no {kind} {str(name)!r}: it is no folder here, and the hub ({_endpoint()}) "
        f"cannot be asked for it ({in_one_line(error)}); check the network and HF_ENDPOINT, or name a "
        "folder."
    )


def in_one_line(error: BaseException) -> str:
    """Return what an error of a library says, for a message: its kind and the start of its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _command(name: HubName) -> str:
    """Return the command that fetches a repository into the cache."""
    revision = "" if name.revision is None else f" --revision {name.revision}"
    return f"hf download {name.repo}{revision}"


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
