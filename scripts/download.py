"""Download published files from the Hugging Face Hub to the places where the configs look for them.

    python scripts/download.py tokenizer codes    # for training, 16.5 GB
    python scripts/download.py tokenizer rear_l   # for sampling

Writes ckpt/maskgitvq.bin (tokenizer), dataset/pretokenized/maskgitvq.jsonl (codes: ten crops of each training image),
ckpt/reAR-*.safetensors and ckpt/rar_*.bin, below the working directory. A download that was cut goes on; a file gets
its name when its size and sha256 are those that the Hub tells. A file that is there stays as it is.
"""

import argparse
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


class Published(NamedTuple):
    repository: str
    file: str
    place: str


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
    """
    Raises:
        InputError: the Hub does not answer or lacks the file, or what came is not what it tells.
    """
    repository, file, place = published
    target = Path(place)
    if target.exists():
        print(f"{target}: there already")
        return
    partial = target.with_name(target.name + ".download")  # a folder, in which a cut download goes on
    try:
        (remote,) = HfApi().get_paths_info(repository, file)
        hf_hub_download(repository, file, local_dir=partial)
    except Exception as error:  # whatever the network library of this release of huggingface_hub raises
        raise InputError(f"{target}: no answer for {file} of {repository} on the Hub: {first_line(error)}") from error
    path = partial / file
    assert isinstance(remote, RepoFile), "no folder"
    check(path, remote)
    publish(path, target)
    for rest in sorted(partial.rglob("*"), reverse=True):
        rest.rmdir() if rest.is_dir() else rest.unlink()
    partial.rmdir()
    print(f"{target}: {file} of {repository}")


def check(path: Path, remote: RepoFile) -> None:
    """
    Raises:
        InputError: another size or, where the Hub tells one, another sha256; the file is deleted.
    """
    found: dict[str, int | str] = {"size": path.stat().st_size}
    expected: dict[str, int | str] = {"size": remote.size}
    if remote.lfs is not None:
        found["sha256"], expected["sha256"] = file_sha256(path, progress=True), remote.lfs.sha256
    if found != expected:
        path.unlink()
        raise InputError(f"{path}: found {found}, expected {expected} as the Hub tells; start again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", choices=FILES)
    for name in parser.parse_args().files:
        download(FILES[name])


if __name__ == "__main__":
    with input_errors_exit():
        main()
