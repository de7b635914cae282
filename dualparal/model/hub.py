"""Downloads from the Hugging Face hub: only the files a run needs, once per host, resumed where they stopped.

Needs no torch. HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are huggingface_hub's to read; nothing here sets them. The
front end downloads before any worker starts, so that no rank ever does; huggingface_hub's file locks keep two programs on one
host from fetching the same file twice. Whenever the hub cannot be asked, what is whole on this host is taken instead.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dualparal.errors import CheckpointError
from dualparal.model.hub_errors import explain
from dualparal.model.parts import DOWNLOADS, KEY_FILES

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


def download_snapshot(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a model repository on this host; what is missing of `DOWNLOADS` is downloaded.

    `revision` is a commit, tag or branch; a commit that is here whole needs no network. Raises `CheckpointError`, or
    `PresetError` for something that cannot be a hub id.
    """

    def ask(is_local: bool) -> Path:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=DOWNLOADS, tqdm_class=_progress_bar(), local_files_only=is_local
        )
        return Path(folder)

    return _ask(repo_id, revision, ask)


def check_revision(repo_id: str, revision: str | None) -> str:
    """One sentence that says what `revision` is on the hub. Raises `CheckpointError` where it cannot be downloaded from.

    Asks the hub for the repository's list of files; downloads nothing.
    """
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(repo_id, revision=revision)
    except Exception as error:
        raise explain(error, repo_id, revision) from None
    names = {item.rfilename for item in found.siblings or []}
    if lost := sorted(name for name in KEY_FILES if name not in names):
        raise CheckpointError(f"{repo_id} at {found.sha} has no {lost[0]}; it is no Wan checkpoint in diffusers' layout")
    return f"{repo_id}: commit {found.sha}, {len(names)} files" + (
        "" if revision == found.sha else "; the preset pins no commit"
    )


def download_file(repo_id: str, name: str) -> Path:
    """One file of a repository, on this host."""

    def ask(is_local: bool) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo_id, name, tqdm_class=_progress_bar(), local_files_only=is_local))

    return _ask(repo_id, None, ask)


def at_hand(name: str) -> Path | None:
    """The file `owner/name/path/in/it` where it was downloaded before; asks nobody."""
    owner, _, rest = name.partition("/")
    repo, _, inside = rest.partition("/")
    if not (owner and repo and inside):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(f"{owner}/{repo}", inside)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def list_files(repo_id: str) -> list[str]:
    """Names of all files of a repository; of those on this host when the hub cannot be asked."""

    def ask(is_local: bool) -> list[str]:
        from huggingface_hub import HfApi, snapshot_download

        if not is_local:
            return HfApi().list_repo_files(repo_id)
        folder = Path(snapshot_download(repo_id, local_files_only=True, allow_patterns=["nothing"]))
        return [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]

    return _ask(repo_id, None, ask)


def _ask(repo_id: str, revision: str | None, ask: Callable[[bool], Answer]) -> Answer:
    """What `ask(False)` has from the hub, else `ask(True)` from this host; when that fails too, why the hub could not be asked.

    Whatever the library raises becomes one sentence: its exceptions are of several HTTP libraries and of Python itself.
    """
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    try:
        return ask(False)
    except Exception as error:
        why = explain(error, repo_id, revision)
        if isinstance(error, (HFValidationError, RevisionNotFoundError)):
            raise why from None
    try:
        found = ask(True)
    except Exception:  # not here either: the first reason is the one to mend
        raise why from None
    log.warning("%s; it is taken from this host as it was downloaded", why)
    return found


def _progress_bar() -> type[Any]:
    """huggingface_hub's bars, on a terminal only: a log file wants none."""
    from huggingface_hub.utils import tqdm

    class TerminalBar(tqdm):
        def __init__(self, *values: Any, **options: Any) -> None:
            super().__init__(*values, **{**options, "disable": options.get("disable") or not sys.stderr.isatty()})

    return TerminalBar
