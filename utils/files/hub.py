"""Files and folders named on the Hugging Face Hub: `hf://OWNER/REPO/FILE`, `hf://OWNER/REPO@REVISION/FILE`; of whole
repositories also `OWNER/REPO`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from utils.errors import InputError
from utils.files.weight_formats import is_index, shards_of

SCHEME = "hf://"
REPOSITORY = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([^/]+))?")
NOT_THERE = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)


def local_file(source: str) -> Path:
    """The path itself, or for an `hf://` name that of the file in the Hub's cache, downloaded if it is not there; with
    an index come its shards.

    Only the scheme asks for a download; with HF_HUB_OFFLINE=1 the cache alone is read.

    Raises:
        InputError: a name of another form, or a file that neither the Hub nor the cache has.
    """
    if not source.startswith(SCHEME):
        return Path(source)
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", source)
    if match is None:
        raise InputError(f"{source}: expected hf://OWNER/REPO/FILE or hf://OWNER/REPO@REVISION/FILE")
    repo, revision, file = match.groups()
    folder = file.rpartition("/")[0]
    try:
        path = Path(hf_hub_download(repo, file, revision=revision))
        for shard in shards_of(path) if is_index(path) else ():
            hf_hub_download(repo, f"{folder}/{shard}".lstrip("/"), revision=revision)
        return path
    except NOT_THERE as error:
        raise _neither(source, error) from error


def local_folder(source: str | Path, files: Sequence[str], **download: Any) -> Path:
    """A folder itself; else, for `OWNER/REPO` or `hf://OWNER/REPO`, that of its files in the Hub's cache, downloaded if
    they are not there.

    A `Path` is never looked for on the Hub, nor is a name that begins with a folder that is here: `outputs/rear` is
    a mistake where `outputs/` is. `hf://outputs/rear` asks the Hub in any case, but with HF_HUB_OFFLINE=1.

    Args:
        files: patterns of what is downloaded.
        download: further arguments of `huggingface_hub.snapshot_download`, as revision, token and cache_dir.

    Raises:
        InputError: no folder, or a repository that neither the Hub nor the cache has.
    """
    path, name = Path(source).expanduser(), REPOSITORY.fullmatch(str(source))
    if path.is_dir():
        return path
    asked = str(source).startswith(SCHEME)
    if name is None or isinstance(source, Path) or (not asked and (path.exists() or path.parent.is_dir())):
        found = "a file" if path.is_file() else "no such folder"
        hint = f"; hf://{source} would ask the Hugging Face Hub" if name is not None and not asked else ""
        raise InputError(f"{source}: found {found}, expected a folder{hint}")
    options: dict[str, Any] = {"revision": name[2], "allow_patterns": [*files], **download}
    try:
        return Path(str(snapshot_download(name[1], **options)))
    except NOT_THERE as error:
        raise _neither(source if asked else f"{source}: no such folder", error) from error


def _neither(source: str | Path, error: Exception) -> InputError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return InputError(f"{source}: neither on the Hub nor in its cache: {' '.join(lines[:2])}")
