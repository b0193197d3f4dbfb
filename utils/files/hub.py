"""Files and folders on the Hugging Face Hub: `hf://OWNER/REPO/FILE`, `hf://OWNER/REPO@REVISION/FILE`; whole
repositories also as `OWNER/REPO`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from utils.errors import InputError, first_line
from utils.files.text import user_path
from utils.files.weight_formats import is_index, shards_of

SCHEME = "hf://"
FILE = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")
REPOSITORY = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([^/]+))?")


def local_file(source: str) -> Path:
    """The path itself, or for an `hf://` name the file in the Hub's cache, downloaded if needed; with an
    index of shards, its shards too. With HF_HUB_OFFLINE=1 only the cache is read. Raises InputError for a malformed
    name or a missing file."""
    if not source.startswith(SCHEME):
        return Path(source)
    match = FILE.fullmatch(source)
    if match is None:
        raise InputError(f"{source}: expected hf://OWNER/REPO/FILE or hf://OWNER/REPO@REVISION/FILE")
    repository, revision, file = match.groups()
    folder = file.rpartition("/")[0]
    try:
        path = Path(hf_hub_download(repository, file, revision=revision))
        for shard in shards_of(path) if is_index(path) else ():
            hf_hub_download(repository, f"{folder}/{shard}".lstrip("/"), revision=revision)
        return path
    except InputError:  # of the index
        raise
    except Exception as error:  # releases of huggingface_hub use different network libraries
        raise _not_available(source, error) from error


def local_folder(source: str | Path, files: Sequence[str], **download: Any) -> Path:
    """The folder itself, or for `OWNER/REPO` or `hf://OWNER/REPO` its folder in the Hub's cache, downloaded if needed.

    A `Path`, or a name whose first part is a local folder, is never looked up on the Hub: `outputs/rear` is a mistake
    if `outputs/` exists. `hf://outputs/rear` is always looked up.

    Args:
        files: patterns of the files to download.
        download: further arguments of `huggingface_hub.snapshot_download`, such as revision, token and cache_dir.

    Raises InputError without such a folder or repository.
    """
    path, name = user_path(str(source)), REPOSITORY.fullmatch(str(source))
    if path.is_dir():
        return path
    has_scheme = str(source).startswith(SCHEME)
    if name is None or isinstance(source, Path) or (not has_scheme and (path.exists() or path.parent.is_dir())):
        found = "a file" if path.is_file() else "no such folder"
        hint = f"; hf://{source} would be looked up on the Hugging Face Hub" if name is not None else ""
        raise InputError(f"{source}: found {found}, expected a folder{hint}")
    options: dict[str, Any] = {"revision": name[2], "allow_patterns": [*files], **download}
    try:
        return Path(str(snapshot_download(name[1], **options)))
    except Exception as error:
        raise _not_available(source if has_scheme else f"{source}: no such folder", error) from error


def upload_files(
    files: Mapping[str, Path | bytes], repository: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload files to a model repository, which is created if needed; returns the URL of the commit.

    Args:
        files: contents by name in the repository.
        private: whether a new repository is private; None: the account's default.
        token: None: the token of `hf auth login` or HF_TOKEN.

    Raises InputError if the Hub does not answer, or refuses.
    """
    try:
        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return str(api.create_commit(repository, operations, commit_message="Upload model"))
    except Exception as error:  # releases of huggingface_hub use different network libraries
        raise InputError(f"{repository}: upload failed: {first_line(error)}") from error


def _not_available(source: str | Path, error: Exception) -> InputError:
    reason = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error  # the Hub's own words
    lines = [line.strip() for line in str(reason).splitlines() if line.strip() and "For more information" not in line]
    return InputError(f"{source}: neither on the Hub nor in its cache: {' '.join(lines[:3])}")
