"""Uploads a finished folder to the Hugging Face Hub: checked before the work, done after it."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexalign._version import __version__
from flexalign.errors import ConfigError, ServingError
from flexalign.models.hub import HubName, in_one_line

NOT_UPLOADED = ("checkpoint-*/*", "round-*/*", "merged/*", "*.partial", "*.partial/*")
"""What a run's folder holds beside its result."""

_LOGIN = "log in with: hf auth login (or set HF_TOKEN)"


@dataclass(frozen=True)
class Push:
    """An upload that is to come.

    Attributes:
        repo: The repository, ``org/name``.
        private: Whether it must be private.
    """

    repo: str
    private: bool = False

    @classmethod
    def checked(cls, repo: str, *, private: bool = False) -> "Push":
        """Check what can be checked without changing anything: the name, the token, its rights.

        Args:
            repo: The repository, ``org/name``; it need not exist.
            private: Whether it must be private.

        Raises:
            ConfigError: If an upload could not succeed; says what to do.
        """
        from huggingface_hub import HfApi, get_token, is_offline_mode

        name = HubName.parse(repo)
        if name is None or name.revision is not None:
            raise ConfigError(
                f"--push {repo}: write the repository as org/name, in letters, digits, '-', '_' and "
                "'.', without a revision."
            )
        if is_offline_mode():
            raise ConfigError(f"--push {repo}: HF_HUB_OFFLINE is set; unset it, or upload later.")
        if get_token() is None:
            raise ConfigError(f"--push {repo} needs a token that may write; {_LOGIN}.")

        try:
            who = HfApi(library_name="flexalign").whoami()
        except Exception as error:
            raise ConfigError(
                f"--push {repo}: the hub does not take your token ({in_one_line(error)}); {_LOGIN}."
            ) from error
        _require_rights(repo, who)
        return cls(repo, private)

    def create(self) -> None:
        """Create the repository, if it does not exist.

        Raises:
            ConfigError: If that is not permitted, or it exists and is public where it must be
                private.
        """
        from huggingface_hub import HfApi

        api = HfApi(library_name="flexalign")
        try:
            api.create_repo(self.repo, private=self.private or None, exist_ok=True)
            is_private = api.repo_info(self.repo).private
        except Exception as error:
            raise ConfigError(
                f"--push {self.repo}: the repository cannot be created ({in_one_line(error)}); name one "
                "that your token may write to."
            ) from error
        if self.private and not is_private:
            raise ConfigError(
                f"--push {self.repo}: it exists and is public, and --private is for a new one; make "
                "it private at the hub first, or leave --private out."
            )

    def upload(self, folder: Path) -> str:
        """Upload a finished folder, without checkpoints; return the repository's address.

        Raises:
            ServingError: If that fails; the folder is as it was, and the message has the command that
                uploads it.
        """
        from huggingface_hub import HfApi, constants

        try:
            HfApi(library_name="flexalign").upload_folder(
                repo_id=self.repo,
                folder_path=folder,
                ignore_patterns=list(NOT_UPLOADED),
                commit_message=f"Upload with flexalign {__version__}",
            )
        except Exception as error:  # whatever it is, the work is done, and the command is needed
            raise ServingError(
                f"{folder} is complete, and its upload to {self.repo} failed ({in_one_line(error)}); "
                f"upload it with: {self.command(folder)}"
            ) from error
        return f"{constants.ENDPOINT}/{self.repo}"

    def command(self, folder: Path) -> str:
        """Return the command that uploads a folder."""
        excluded = [word for name in NOT_UPLOADED for word in ("--exclude", name)]
        private = ["--private"] if self.private else []
        return shlex.join(["hf", "upload", self.repo, str(folder), ".", *private, *excluded])


def _require_rights(repo: str, who: dict[str, Any]) -> None:
    """Refuse a token that cannot write to a repository's owner.

    Raises:
        ConfigError: If it reads alone, or its user is neither the owner nor in the organisation.
    """
    owner, user = repo.partition("/")[0], str(who.get("name", ""))
    if (who.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError(
            f"--push {repo}: the token of {user} may read alone; {_LOGIN}, with a token that may "
            "write."
        )
    organisations = [str(one.get("name")) for one in who.get("orgs") or ()]
    if owner not in (user, *organisations):
        known = ", ".join([user, *organisations])
        raise ConfigError(
            f"--push {repo}: {user} may not write to {owner}; name a repository of {known}."
        )
