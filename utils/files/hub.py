"""Files named on the Hugging Face Hub: `hf://OWNER/REPO/FILE`, or `hf://OWNER/REPO@REVISION/FILE`."""

import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from utils.errors import InputError
from utils.files.weight_formats import is_index, shards_of

SCHEME = "hf://"


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
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{source}: neither on the Hub nor in its cache: {reason}") from error
