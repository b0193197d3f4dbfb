"""Names on the Hub, with a cache written by hand: nothing is downloaded here."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from utils.errors import InputError
from utils.files import hub

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The layout of the Hub's cache, with one file of someone/model."""
    repo = tmp_path / "models--someone--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    (repo / f"snapshots/{COMMIT}/sub").mkdir(parents=True)
    (repo / f"snapshots/{COMMIT}/sub/weights.bin").write_text("weights")

    def from_cache_only(repo_id: str, filename: str, revision: str | None) -> str:
        arguments = {"revision": revision, "cache_dir": tmp_path, "local_files_only": True}
        return huggingface_hub.hf_hub_download(repo_id, filename, **arguments)

    monkeypatch.setattr(hub, "hf_hub_download", from_cache_only)
    return tmp_path


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_cached_file_is_found(cache: Path, revision: str) -> None:
    assert hub.local_file(f"hf://someone/model{revision}/sub/weights.bin").read_text() == "weights"


def test_the_shards_of_an_index_are_downloaded_too(cache: Path) -> None:
    folder = cache / f"models--someone--model/snapshots/{COMMIT}/sub"
    (folder / "w.index.json").write_text('{"weight_map": {"a": "weights.bin"}}')
    assert hub.local_file("hf://someone/model/sub/w.index.json") == folder / "w.index.json"
    (folder / "w.index.json").write_text('{"weight_map": {"a": "weights.bin", "b": "more.bin"}}')
    with pytest.raises(InputError, match="neither on the Hub nor in its cache"):
        hub.local_file("hf://someone/model/sub/w.index.json")


def test_a_path_is_unchanged(cache: Path) -> None:
    assert hub.local_file("someone/model/weights.bin") == Path("someone/model/weights.bin")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://someone/model", "expected hf://OWNER/REPO/FILE"),
        ("hf://someone/model/other.bin", "neither on the Hub nor in its cache"),
        ("hf://someone/model@v2/sub/weights.bin", "neither on the Hub nor in its cache"),
    ],
)
def test_errors_name_the_source(cache: Path, source: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        hub.local_file(source)
    assert str(error.value).startswith(f"{source}: ")
    assert "\n" not in str(error.value)


def test_a_folder_is_looked_up_on_the_hub_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, **options: object) -> str:
        asked.append((repo, options["revision"]))
        raise LocalEntryNotFoundError("cannot\nreach the Hub")

    asked: list[tuple[str, object]] = []
    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/rear").mkdir(parents=True)
    (tmp_path / "outputs/file").write_text("")
    for source in ("outputs/rear", Path("outputs/rear"), "outputs", str(tmp_path / "outputs/rear")):
        assert hub.local_folder(source, []) == Path(source)
    for source, message in {
        "outputs/raer": "outputs/raer: found no such folder, expected a folder; hf://outputs/raer would",
        "outputs/file": "outputs/file: found a file, expected a folder",
        Path("someone/model"): "someone/model: found no such folder, expected a folder",
        "model": "model: found no such folder, expected a folder",
        "./someone/model": "./someone/model: found no such folder, expected a folder",
        "/someone/model": "/someone/model: found no such folder, expected a folder",
    }.items():
        with pytest.raises(InputError, match=f"^{message}"):
            hub.local_folder(source, [])
    assert asked == []
    for source in ("someone/model", "hf://someone/model", "hf://someone/model@v2", "hf://outputs/raer"):
        with pytest.raises(InputError, match=r"neither on the Hub nor in its cache: cannot reach the Hub$"):
            hub.local_folder(source, [])
    assert asked == [("someone/model", None)] * 2 + [("someone/model", "v2"), ("outputs/raer", None)]
