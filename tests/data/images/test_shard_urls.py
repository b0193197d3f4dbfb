"""Shards at URLs: every failure of a server ends in the right bytes, or in one line."""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images import shard_urls
from data.images.reading import open_images
from data.images.shard_cache import ShardCache
from data.images.shard_urls import expand_urls, read_blocks
from tests.data.images.made_up_shards import write_tar
from tests.hub_server import local_hub
from tests.shard_server import Fault, ShardServer, serve_shards
from utils.errors import InputError


def noise(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_shards(folder: Path, samples_per_shard: tuple[int, ...] = (4, 3, 5)) -> Path:
    """Shards a-000000.tar and so on, with samples of classes 0 and 1 by turns, and shards.json with the counts."""
    first = 0
    for number, count in enumerate(samples_per_shard):
        samples = range(first, first + count)
        members = {
            f"{i:03d}.{kind}": noise(i) if kind == "png" else f"{i % 2}".encode()
            for i in samples
            for kind in ("cls", "png")
        }
        write_tar(folder / f"a-{number:06d}.tar", members)
        first += count
    counts = {f"a-{number:06d}.tar": count for number, count in enumerate(samples_per_shard)}
    (folder / "shards.json").write_text(json.dumps(counts))
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    """It serves three shards; blocks are small and waits short."""
    monkeypatch.setattr(shard_urls, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(shard_urls, "FIRST_WAIT_S", 0.001)
    with serve_shards(write_shards(tmp_path / "served")) as server:
        yield server


def content_of(server: ShardServer, name: str = "a-000000.tar") -> bytes:
    return (server.folder / name).read_bytes()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "faults",
    [
        [],
        [Fault(break_after=700)],
        [Fault(break_after=0), Fault(break_after=1999), Fault(break_after=1)],
        [Fault(status=503), Fault(status=429, retry_after="0"), Fault(status=500)],
        [Fault(short=500), Fault(short=0)],
        [Fault(delay=0.2)],
    ],
)
def test_failures_that_pass_do_no_harm(server: ShardServer, ranges: bool, faults: list[Fault]) -> None:
    server.ranges = ranges
    server.faults["a-000000.tar"] = list(faults)
    assert b"".join(read_blocks(server.url("a-000000.tar"))) == content_of(server)
    assert not server.faults["a-000000.tar"]


def test_a_stream_is_continued_where_it_broke(server: ShardServer) -> None:
    server.faults["a-000000.tar"] = [Fault()] * 2 + [Fault(break_after=100)]
    assert b"".join(read_blocks(server.url("a-000000.tar"))) == content_of(server)
    starts = [start for _, start in server.asked]
    assert starts[:4] == [0, 2000, 4000, 4000]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(break_after=300), r"at byte 0 of \d+: .*; tried 8 times"),
        (Fault(short=0), r"at byte 0 of \d+: the connection ended; tried 8 times"),
        (Fault(status=503), r"at byte 0 of \d+: .*503.*; tried 8 times"),
        (Fault(status=403), "403"),
        (Fault(status=404), "no such file"),
    ],
)
def test_failures_that_stay_are_one_line(
    server: ShardServer, fault: Fault, expected: str, capsys: pytest.CaptureFixture
) -> None:
    server.faults["a-000000.tar"] = [fault] * 100
    with pytest.raises(InputError, match=rf"^{re.escape(server.url('a-000000.tar'))}: .*{expected}") as error:
        list(read_blocks(server.url("a-000000.tar")))
    assert "\n" not in str(error.value)
    tries = 100 - len(server.faults["a-000000.tar"])
    assert tries == (8 if "tried" in expected else 1)
    assert capsys.readouterr().err.count("trying again in 0 s") == tries - 1


def test_a_missing_shard_is_named(server: ShardServer, tmp_path: Path) -> None:
    url = server.url("a-{000000..000003}.tar")
    with pytest.raises(InputError, match=r"a-000003\.tar: no such file"):
        open_images(url, cache=ShardCache(tmp_path / "cache", 1e9))
    with pytest.raises(InputError, match=r"found URLs, expected local shards, or dataset\.params\.cache_dir"):
        open_images(url)
    with pytest.raises(InputError, match=r"a-000000\.tar twice, expected each shard once"):
        expand_urls(server.url("a-00000{0,0}.tar"))
    with pytest.raises(InputError, match="nosuchscheme"):
        list(read_blocks("nosuchscheme://bucket/a.tar"))


@pytest.mark.parametrize("cut_at", [1024, 3000, -1024])
def test_a_truncated_file_is_never_fewer_samples(server: ShardServer, tmp_path: Path, cut_at: int) -> None:
    """The server believes in it, too: between two members, in a member, before the end mark."""
    (server.folder / "shards.json").unlink()
    path = server.folder / "a-000001.tar"
    with tarfile.open(path) as tar:
        end = max(member.offset_data + 512 * -(-member.size // 512) for member in tar)
    path.write_bytes(path.read_bytes()[: end if cut_at < 0 else cut_at])
    cache = ShardCache(tmp_path / "cache", 1e9)
    with pytest.raises(InputError, match=rf"^{re.escape(server.url('a-000001.tar'))}: ") as error:
        open_images(server.url("a-{000000..000002}.tar"), cache=cache)
    assert re.search(r"after \d+ images|at byte \d+", str(error.value))
    assert not cache.path_of(server.url("a-000001.tar")).exists()


def test_copies_are_read_as_the_files(server: ShardServer, tmp_path: Path) -> None:
    (server.folder / "classes.json").write_text('["x", "y"]')
    cache = ShardCache(tmp_path / "cache", 1e9)
    pattern = server.url("a-{000000..000002}.tar?signature=1")
    for query in ("?signature=1", "?signature=2"):  # the second time without a request
        found = open_images(server.url(f"a-{{000000..000002}}.tar{query}"), cache=cache)
        expected = open_images(str(server.folder / "a-*.tar"))
        assert found.fingerprint == expected.fingerprint
        assert [found.read(i) for i in range(12)] == [expected.read(i) for i in range(12)]
        assert found.class_names == ["x", "y"]
    assert [name for name, start in server.asked if start == 0 and name.endswith("tar")].count("a-000000.tar") == 1
    assert cache.fetch(pattern) == [cache.path_of(server.url(f"a-00000{i}.tar")) for i in range(3)]


def test_what_does_not_fit_is_said_before_the_first_download(server: ShardServer, tmp_path: Path) -> None:
    total = sum(path.stat().st_size for path in server.folder.glob("*.tar"))
    pattern = server.url("a-{000000..000002}.tar")
    with pytest.raises(InputError, match=r"3 shards of .* GB do not fit .*cache_size_gb=.*scripts/pretokenize\.py"):
        open_images(pattern, cache=ShardCache(tmp_path / "cache", total - 1))
    assert not server.asked
    assert len(open_images(pattern, cache=ShardCache(tmp_path / "cache", total))) == 12
    (server.folder / "b.tar").write_bytes(content_of(server))
    with pytest.raises(InputError, match=r"b\.tar: 1 shards of .* do not fit next to the .* GB in"):
        open_images(server.url("b.tar"), cache=ShardCache(tmp_path / "cache", total))


def test_pipes(server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(tmp_path / "cache", 1e9)
    found = open_images(f"pipe:cat {server.folder}/a-{{000000..000002}}.tar", cache=cache)
    expected = open_images(str(server.folder / "a-*.tar"))
    assert found.fingerprint == expected.fingerprint
    assert [found.read(i) for i in range(12)] == [expected.read(i) for i in range(12)]
    with pytest.raises(InputError, match=r"^pipe:head -c 3000 .*: .*after 1 images"):
        open_images(f"pipe:head -c 3000 {server.folder}/a-000000.tar", cache=cache)
    with pytest.raises(InputError, match=r"^pipe:nosuchcommand: cannot be run, exit status 127"):
        open_images("pipe:nosuchcommand", cache=cache)
    with pytest.raises(InputError, match=r"^pipe:cat .*; exit 3: at byte \d+: .*exit status 3; tried 8 times"):
        open_images(f"pipe:cat {server.folder}/a-000000.tar; exit 3", cache=cache)
    flag = tmp_path / "flag"  # it fails once
    shard = server.folder / "a-000000.tar"
    once = f"pipe:head -c 3000 {shard}; test -e {flag} && tail -c +3001 {shard} || (touch {flag}; exit 1)"
    assert b"".join(read_blocks(once)) == content_of(server)


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path / "files")
    with local_hub() as hub:
        hub.files["datasets/someone/shards"] = {path.name: path.read_bytes() for path in folder.iterdir()}
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"  # what HF_ENDPOINT sets before the start
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        for name in ("a-{000000..000002}.tar", "a-*.tar"):
            cache = ShardCache(tmp_path / f"cache{len(name)}", 1e9)
            found = open_images(f"hf://datasets/someone/shards/{name}", cache=cache)
            assert found.fingerprint == open_images(str(folder / "a-*.tar")).fingerprint
