"""A bounded folder of local copies of shards at URLs, for random access.

Each shard is downloaded once per machine: a process holds the lock of the folder while it downloads, and the others
find the files. A copy is complete, headers read, or not there. Nothing is evicted: another run may be reading it.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm

from data.images.shard_index import index_path, load_index, write_index
from data.images.shard_urls import (
    PIPE,
    RemoteFile,
    describe_url,
    expand_urls,
    file_name,
    read_blocks,
    read_small,
    without_query,
)
from data.images.tar_shards import (
    CLASS_NAMES_FILE,
    COUNTS_FILE,
    ShardSamples,
    check_counts,
    read_class_names,
    read_headers,
)
from utils.errors import InputError
from utils.files.atomic import atomic_file
from utils.files.lock import LOCK, only_writer
from utils.files.text import user_path
from utils.schema import DatasetParams

GB = 10**9
DOWNLOADS = 8  # at a time


class ShardCache:
    """
    Args:
        folder: created if needed; on a local disk, shared by all runs of the machine.
        max_bytes: of all files in it.
    """

    def __init__(self, folder: Path, max_bytes: float) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    @classmethod
    def of(cls, params: DatasetParams) -> "ShardCache | None":
        """None without `cache_dir`."""
        folder, max_bytes = params.cache_dir, params.cache_size_gb * GB
        return None if folder is None else cls(user_path(folder), max_bytes)

    def path_of(self, url: str) -> Path:
        """Of the copy. Shards of one remote folder are in one local folder, with their classes.json and shards.json."""
        if url.startswith(PIPE):
            return self.folder / "pipe" / f"{sha256(url.encode()).hexdigest()[:16]}.tar"
        parent = without_query(url).rpartition("/")[0]
        return self.folder / f"{file_name(parent)}-{sha256(parent.encode()).hexdigest()[:12]}" / file_name(url)

    def paths_of(self, pattern: str) -> list[Path]:
        """Of the copies of all shards of a pattern, which need not exist; asks no server, unless the pattern has *."""
        return [self.path_of(url) for url in expand_urls(pattern)]

    def fetch(self, pattern: str) -> list[Path]:
        """Copies of the shards, after those that are missing are downloaded. Raises InputError, before the first
        download, if they do not fit, and for a shard that cannot be read."""
        urls = expand_urls(pattern)
        paths = [self.path_of(url) for url in urls]
        with only_writer(self.folder, inside=True, wait=True):
            missing = [url for url, path in zip(urls, paths, strict=True) if not path.exists()]
            if missing:
                self._download(pattern, missing)
        return paths

    def _download(self, pattern: str, missing: list[str]) -> None:
        for leftover in self.folder.rglob("*.tmp"):  # of a killed process
            leftover.unlink()
        with ThreadPoolExecutor(DOWNLOADS) as threads:
            files = list(threads.map(describe_url, missing))
        self._check_space(pattern, files)
        self.copy_companions(missing)
        total = sum(file.size or 0 for file in files) or None
        with tqdm(total=total, desc="downloading shards", unit="B", unit_scale=True, delay=2) as progress:
            threads = ThreadPoolExecutor(DOWNLOADS)
            downloads = [threads.submit(self.fetch_one, url, progress) for url in missing]
            try:
                for download in downloads:
                    download.result()
            finally:
                threads.shutdown(cancel_futures=True)

    def fetch_one(self, url: str, progress: tqdm | None = None) -> Path:
        """Copy a shard, whether there is a copy or not, and write its index. Raises InputError if it cannot be read, is
        damaged or is not as in shards.json; there is no copy then."""
        path = self.path_of(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial, partial.open("wb") as file:
            for block in read_blocks(url):
                file.write(block)
                if progress is not None:
                    progress.update(len(block))
        try:
            index = read_headers(path)
            [index.sha256] = check_counts([], {path: index})
        except InputError as error:
            path.unlink()
            raise InputError(f"{url}: {str(error).removeprefix(f'{path}: ')}") from error
        write_index(path, index, path.stat().st_size)
        return path

    def copy_companions(self, urls: list[str]) -> None:
        """Copy classes.json and shards.json from the folders of shards, where they have them."""
        for folder, url in {self.path_of(url).parent: url for url in urls if not url.startswith(PIPE)}.items():
            folder.mkdir(parents=True, exist_ok=True)
            address = without_query(url)
            for name in (CLASS_NAMES_FILE, COUNTS_FILE):
                content = read_small(address.rpartition("/")[0] + f"/{name}" + url.removeprefix(address))
                if content is not None:
                    with atomic_file(folder / name) as partial, partial.open("wb") as file:
                        file.write(content)

    def samples_of(self, urls: list[str]) -> ShardSamples:
        """The samples of shards by the indices of their copies, of which only these need to be there still."""
        paths = [self.path_of(url) for url in urls]
        indices = [load_index(index_path(path))[0] for path in paths]
        return ShardSamples(urls, indices, read_class_names(paths), [index.sha256 for index in indices])

    def _check_space(self, pattern: str, files: list[RemoteFile]) -> None:
        needed = sum(file.size or 0 for file in files)
        present = sum(path.stat().st_size for path in self.folder.rglob("*") if path.name != LOCK and path.is_file())
        if needed + present > self.max_bytes:
            raise InputError(
                f"{pattern}: {len(files)} shards of {needed / GB:.3g} GB do not fit next to the {present / GB:.3g} GB "
                f"in {self.folder}, expected at most dataset.params.cache_size_gb={self.max_bytes / GB:.3g}; give a "
                "larger cache, delete unused copies, or train on tokens (scripts/pretokenize.py needs no cache)"
            )
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"dataset.params.cache_dir={self.folder}: found {free / GB:.3g} GB free, expected {needed / GB:.3g} "
                f"for the shards of {pattern}"
            )
