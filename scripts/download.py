"""Download published files from the Hugging Face Hub to the paths that the configs name.

    python scripts/download.py tokenizer codes    # for training, 16.5 GB
    python scripts/download.py tokenizer rear_l   # for sampling

Writes ckpt/maskgitvq.bin (tokenizer), dataset/pretokenized/maskgitvq.jsonl (codes: ten crops of each training image),
ckpt/reAR-*.safetensors and ckpt/rar_*.bin, below the working directory. Rerun the same command to resume a download.
Size and sha256 are compared with the Hub's before a file gets its final name; existing files are kept.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoFile

from utils.errors import InputError, first_line, input_errors_exit
from utils.files.atomic import publish
from utils.files.hashing import file_sha256
from utils.files.lock import only_writer
from utils.files.provenance import differences


class Published(NamedTuple):
    repository: str
    file: str
    target: str


RAR_SIZES = ("b", "l", "xl", "xxl")
FILES = {
    "tokenizer": Published("fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin", "ckpt/maskgitvq.bin"),
    "codes": Published("yucornetto/RAR", "maskgitvq.jsonl", "dataset/pretokenized/maskgitvq.jsonl"),
    "rear_s": Published("qyoo/reAR", "reAR-S.safetensors", "ckpt/reAR-S.safetensors"),
    "rear_b": Published("qyoo/reAR", "reAR-B.safetensors", "ckpt/reAR-B.safetensors"),
    "rear_l": Published("qyoo/reAR", "reAR-L.safetensors", "ckpt/reAR-L.safetensors"),
    **{f"rar_{size}": Published("yucornetto/RAR", f"rar_{size}.bin", f"ckpt/rar_{size}.bin") for size in RAR_SIZES},
}


def download(published: Published) -> None:
    """Raises InputError if the Hub does not answer or lacks the file, the download differs from it, or another process
    downloads it."""
    target = Path(published.target)
    if target.exists():
        print(f"{target}: exists")
        return
    with only_writer(target):
        if not target.exists():  # another process may have been faster
            fetch(published, target)
    print(f"{target}: {published.file} of {published.repository}")


def fetch(published: Published, target: Path) -> None:
    partial = target.with_name(target.name + ".download")  # a folder, from which a later call resumes
    try:
        (remote,) = HfApi().get_paths_info(published.repository, published.file)
        hf_hub_download(published.repository, published.file, local_dir=partial)
    except Exception as error:  # error classes depend on the release of huggingface_hub
        raise InputError(
            f"{target}: found no answer for {published.file} of {published.repository} on the Hub: {first_line(error)}"
        ) from error
    path = partial / published.file
    assert isinstance(remote, RepoFile), "no folder"
    check(path, remote)
    publish(path, target)
    shutil.rmtree(partial)


def check(path: Path, remote: RepoFile) -> None:
    """Delete the file and raise InputError if the size or, where the Hub has one, the sha256 differs."""
    found: dict[str, int | str] = {"size": path.stat().st_size}
    expected: dict[str, int | str] = {"size": remote.size}
    if remote.lfs is not None:
        found["sha256"] = file_sha256(path, progress=True)
        expected["sha256"] = remote.lfs.sha256
    different = differences(found, expected)
    if different:
        path.unlink()
        raise InputError(f"{path}: {different[0]} as on the Hub; rerun the same command")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", choices=FILES)
    for name in parser.parse_args().files:
        download(FILES[name])


if __name__ == "__main__":
    with input_errors_exit():
        main()
