"""Shards at URLs: their names, and their bytes in order, with retries.

`https://`, `hf://datasets/OWNER/REPO/...`, `s3://`, `gs://` and any other scheme of fsspec, which finds credentials
where each service keeps them; and `pipe:COMMAND`, a shell command that writes the shard. Not webdataset's openers: they
start curl, whose retry begins a broken shard anew in the middle of the stream, and gsutil.
"""

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import urlparse

import fsspec
from braceexpand import braceexpand

from utils.console import printable_text
from utils.errors import InputError, first_line

PIPE = "pipe:"
URL = re.compile(rf"[A-Za-z][\w+.-]*://|{PIPE}")
BLOCK_BYTES = 2**24  # of a request, and between two chances to retry
RETRIES = 7  # in a row
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # after the first failure; each further wait is twice as long
SILENCE_S = 60  # without a byte, after which a connection counts as broken
MAY_PASS = (408, 425, 429)  # statuses from 400 to 499 that end by waiting
NOT_RUN = (126, 127)  # exit statuses of a shell that did not find or could not start a command
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, InputError)
VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "last_modified", "updated", "mtime")


@dataclass(frozen=True)
class RemoteFile:
    """What a server says about a file."""

    size: int | None  # bytes; None: not stated
    version: str  # changes with the content; empty: not stated


def is_url(reference: str) -> bool:
    return URL.match(reference) is not None


def expand_urls(pattern: str) -> list[str]:
    """The URLs of a pattern with braces, or with * where the service can list files (not https). Raises InputError for
    none, or for one shard twice."""
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{pattern}: expected balanced braces, as in train-{{000..252}}.tar") from error
    urls = [url for name in names for url in _listed(name)]
    repeated = next((url for url, count in Counter(map(without_query, urls)).items() if count > 1), None)
    if repeated is not None:
        raise InputError(f"{pattern}: found {repeated} twice, expected each shard once")
    return urls


def _listed(name: str) -> list[str]:
    if "*" not in name or name.startswith(("http", PIPE)):
        return [name]

    def ask() -> list[str]:
        files, path = _open(name)
        return sorted(map(files.unstrip_protocol, files.glob(path)))

    found = retried(name, ask)
    if not found:
        raise InputError(f"{name}: no such shard")
    return found


def without_query(url: str) -> str:
    """A signed URL has another query each time."""
    return url.partition("?")[0] if url.startswith("http") else url


def file_name(url: str) -> str:
    return urlparse(url).path.rpartition("/")[2]


def describe_url(url: str) -> RemoteFile:
    """Size and version of the file; raises InputError if it cannot be had."""
    if url.startswith(PIPE):
        return RemoteFile(size=None, version="")

    def ask() -> RemoteFile:
        files, path = _open(url)
        facts = files.info(path)
        version = next((str(facts[name]) for name in VERSIONS if facts.get(name)), "")
        return RemoteFile(size=facts.get("size"), version=version)

    return retried(url, ask)


def read_small(url: str) -> bytes | None:
    """The whole file; None if the server has none, or shows none."""
    try:
        return b"".join(read_blocks(url))
    except MissingError:
        return None


class MissingError(InputError):
    """A request that no retry helps."""


def read_blocks(url: str) -> Iterator[bytes]:
    """The bytes of a file in order. After a failure it is opened again at the byte that was reached.

    Raises InputError, with URL and byte, for a failure that stays, and for a file that ends early or changes meanwhile.
    """
    position, size = 0, describe_url(url).size
    retry = Retry(url)
    while True:
        try:
            with _opened(url, position, size) as file:
                while block := file.read(BLOCK_BYTES):
                    position += len(block)
                    if size is not None and position > size:
                        raise InputError(f"{url}: found more than the {size} bytes that the server stated")
                    retry.failures = 0
                    yield block
            if size is None or position == size:
                return
            raise EOFError("the connection ended")
        except Exception as error:  # each service has errors of its own
            of_size = "" if size is None else f" of {size}"
            retry.wait(error, f"at byte {position}{of_size}: ")


@contextmanager
def _opened(url: str, position: int, size: int | None) -> Iterator[IO[bytes]]:
    """The file at a URL from a byte on."""
    if url.startswith(PIPE):
        with subprocess.Popen(url.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            _skip(process.stdout, position)
            yield process.stdout
        if process.returncode in NOT_RUN:
            raise MissingError(f"{url}: cannot be run, exit status {process.returncode}")
        if process.returncode:
            raise OSError(f"the command ended with exit status {process.returncode}")
        return
    files, path = _open(url)
    with files.open(path, "rb", block_size=BLOCK_BYTES, cache_type="none") as file:
        found = getattr(file, "size", None)  # None: of a server that does not serve parts
        if found is not None and found != size:
            raise InputError(f"{url}: found {found} bytes, {size} before; it was changed while it was read")
        if found is None:
            _skip(file, position)
        else:
            file.seek(position)
        yield file


def _skip(file: IO[bytes], count: int) -> None:
    while count and (block := file.read(min(count, BLOCK_BYTES))):
        count -= len(block)


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it."""
    options: dict[str, Any] = {}
    if url.startswith("http"):
        from aiohttp import ClientTimeout  # slow to import

        timeout = ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # proxies and ~/.netrc
    try:
        return fsspec.url_to_fs(url, **options)
    except ValueError as error:
        raise InputError(f"{url}: {first_line(error)}") from error


def retried(url: str, action: Callable[[], Any]) -> Any:
    retry = Retry(url)
    while True:
        try:
            return action()
        except Exception as error:  # each service has errors of its own
            retry.wait(error)


class Retry:
    """Failures in a row of requests for a URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.failures = 0

    def wait(self, error: Exception, where: str = "") -> None:
        """Wait before the next try; raises InputError if no further one makes sense."""
        self.failures += 1
        if isinstance(error, InputError):
            raise error
        status = status_of(error)
        if isinstance(error, PERMANENT) or (status is not None and 400 <= status < 500 and status not in MAY_PASS):
            raise MissingError(f"{self.url}: {where}{describe_error(error)}") from error
        if self.failures > RETRIES:
            raise InputError(f"{self.url}: {where}{describe_error(error)}; tried {self.failures} times") from error
        asked = str((getattr(error, "headers", None) or {}).get("Retry-After", ""))
        wait = float(asked) if asked.isdecimal() else FIRST_WAIT_S * 2 ** (self.failures - 1)
        wait = min(wait, LONGEST_WAIT_S)
        reason = f"{self.url}: {where}{describe_error(error)}"
        print(f"notice: {printable_text(reason)}; trying again in {wait:.0f} s", file=sys.stderr, flush=True)
        time.sleep(wait)


def status_of(error: Exception) -> int | None:
    """HTTP status of an error of aiohttp, of the Hub or of gcsfs."""
    places = ((error, "status"), (getattr(error, "response", None), "status_code"), (error, "code"))
    found = (str(getattr(place, name, None)) for place, name in places)
    return next((int(value) for value in found if value.isdecimal()), None)


def describe_error(error: Exception) -> str:
    """In a few words."""
    status = status_of(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "no such file"
    text = first_line(error)
    return text if status is None or str(status) in text else f"status {status}: {text}"
