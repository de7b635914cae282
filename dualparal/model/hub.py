"""Downloads from the Hugging Face hub: only the files a run needs, once per host, resumed where they stopped.

Needs no torch. HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are huggingface_hub's to read; nothing here sets them. The
front end downloads before any worker starts, so that no rank ever does; huggingface_hub's file locks keep two programs on one
host from fetching the same file twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dualparal.errors import CheckpointError, PresetError

NEEDED = [
    "model_index.json", "scheduler/*.json", "tokenizer/*", "*/config.json", "transformer*/*.safetensors*",
    "vae/*.safetensors*", "text_encoder/*.safetensors*",
]  # fmt: skip
KEY_FILES = ("model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json")


def download_snapshot(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a model repository on this host; what is missing of `NEEDED` is downloaded.

    `revision` is a commit, tag or branch; a commit that is here whole needs no network. Raises `CheckpointError`, or
    `PresetError` for something that cannot be a hub id.
    """
    from huggingface_hub import snapshot_download

    with _explained(repo_id, revision):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=NEEDED, tqdm_class=_progress_bar()))


def check_revision(repo_id: str, revision: str | None) -> str:
    """One sentence that says what `revision` is on the hub. Raises `CheckpointError` where it cannot be downloaded from.

    Asks the hub for the repository's list of files; downloads nothing.
    """
    from huggingface_hub import HfApi

    with _explained(repo_id, revision):
        found = HfApi().model_info(repo_id, revision=revision)
    names = {item.rfilename for item in found.siblings or []}
    if lost := sorted(name for name in KEY_FILES if name not in names):
        raise CheckpointError(f"{repo_id} at {found.sha} has no {lost[0]}; it is no Wan checkpoint in diffusers' layout")
    return f"{repo_id}: commit {found.sha}, {len(names)} files" + (
        "" if revision == found.sha else "; the preset pins no commit"
    )


def download_file(repo_id: str, name: str) -> Path:
    """One file of a repository, on this host."""
    from huggingface_hub import hf_hub_download

    with _explained(repo_id, None):
        return Path(hf_hub_download(repo_id, name, tqdm_class=_progress_bar()))


def list_files(repo_id: str) -> list[str]:
    """Names of all files of a repository; of those on this host when the hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    with _explained(repo_id, None):
        try:
            return HfApi().list_repo_files(repo_id)
        except (OfflineModeIsEnabled, ConnectionError):
            folder = Path(snapshot_download(repo_id, local_files_only=True))
            return [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence with a way out."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    sentences: list[tuple[type[Exception], Callable[[Exception], str]]] = [
        (GatedRepoError, lambda _: f"{repo_id} asks for consent: accept its terms on the hub and set HF_TOKEN"),
        (RepositoryNotFoundError, lambda _: f"there is no model {repo_id} on the hub (or it is private: set HF_TOKEN)"),
        (RevisionNotFoundError, lambda _: f"{repo_id} has no revision {revision}; correct the preset's revision"),
        (
            LocalEntryNotFoundError,
            lambda _: (
                f"{repo_id} is not whole on this host and the hub cannot be reached; check the network, HF_HOME or "
                "HF_HUB_OFFLINE"
            ),
        ),
        (EntryNotFoundError, lambda error: f"{repo_id} lacks a file: {_first_line(error)}"),
        (
            OfflineModeIsEnabled,
            lambda _: f"{repo_id} is not whole on this host and HF_HUB_OFFLINE is set; unset it to download",
        ),
        (HfHubHTTPError, lambda error: f"{repo_id} could not be downloaded: {_first_line(error)}; run again to go on"),
        (OSError, lambda error: f"{repo_id} could not be downloaded: {_first_line(error)}; run again to go on"),
    ]
    try:
        yield
    except HFValidationError as error:
        raise PresetError(f"'{repo_id}' is neither a folder nor a hub id: {_first_line(error)}") from None
    except Exception as error:
        for kind, sentence in sentences:
            if isinstance(error, kind):
                raise CheckpointError(sentence(error)) from None
        if type(error).__module__.partition(".")[0] in ("httpx", "httpcore", "requests", "hf_xet"):
            raise CheckpointError(f"{repo_id} could not be downloaded: {_first_line(error)}; run again to go on") from None
        raise


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _progress_bar() -> type[Any]:
    """huggingface_hub's bars, on a terminal only: a log file wants none."""
    from huggingface_hub.utils import tqdm

    class TerminalBar(tqdm):
        def __init__(self, *values: Any, **options: Any) -> None:
            super().__init__(*values, **{**options, "disable": options.get("disable") or not sys.stderr.isatty()})

    return TerminalBar
