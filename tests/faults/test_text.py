"""Names and text from other systems: locales that are not UTF-8, byte order marks, accents of macOS, `~`, and paths
that look like patterns."""

import json
import shutil
import subprocess
import sys
import unicodedata
from codecs import BOM_UTF8
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from data.codes.jsonl import Sizes
from data.codes.store_files import write_meta
from data.codes.token_store import TokenStore, open_tokens
from data.images.reading import open_images
from data.images.tar_shards import find_shards
from data.training_batches import asked_classes
from data.validation_data import open_validation_data
from scripts import make_shards
from tests.conftest import make_noise_images
from tests.faults.runs import launch_environment
from tests.processes import ROOT
from utils.config import load_config, read_yaml
from utils.errors import InputError
from utils.files.json_file import read_json
from utils.files.text import read_text

LOCALES = {"ISO-8859-1": "en_US", "GB18030": "zh_CN"}
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
SIZES = Sizes(codebook_size=24, image_seq_len=16, num_classes=5)


@pytest.fixture(scope="session", params=["ISO-8859-1", pytest.param("GB18030", marks=pytest.mark.slow)])
def locale(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables of a locale that is not UTF-8."""
    language, charset = LOCALES[request.param], request.param
    folder = tmp_path_factory.mktemp("locales")
    command = ["localedef", "-i", language, "-f", charset, str(folder / f"{language}.{charset}")]
    if shutil.which("localedef") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"localedef cannot make the locale {language}.{charset}")
    return {"LOCPATH": str(folder), "LC_ALL": f"{language}.{charset}", "PYTHONUTF8": "0"}


LOCK_A_CAT = """
import sys
from pathlib import Path
from utils.errors import input_errors_exit
from utils.files.lock import only_writer
with input_errors_exit(), only_writer(Path(sys.argv[1], "\\u732b", "run"), inside=True):
    pass
"""


def run(locale: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Exit status and stderr of a program in a new interpreter, whose encoding is that of the locale."""
    environment = launch_environment(**locale)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True)
    return done.returncode, done.stderr.decode(errors="replace")


def images_with_accents(folder: Path) -> Path:
    """Two classes; class names and file names are not ASCII, and one is not UTF-8."""
    for name in ("été", "猫"):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (90 * i, 0, 0)).save(folder / name / f"bild ä{i}.png")
    shutil.copy(folder / "été/bild ä0.png", folder / "été/\udcff.png")
    return folder


def test_shards_are_the_same_in_every_locale(locale: dict[str, str], tmp_path: Path) -> None:
    images = images_with_accents(tmp_path / "images")
    (tmp_path / "names.txt").write_bytes(BOM_UTF8 + "été Sommer, ß\n猫 猫 cat\n".encode())
    options = [str(images), "--class-names", str(tmp_path / "names.txt"), "--processes", "1"]
    make_shards.main([options[0], str(tmp_path / "here"), *options[1:]])
    assert run(locale, "scripts/make_shards.py", options[0], str(tmp_path / "there"), *options[1:])[0] == 0
    here, there = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("here", "there"))
    assert here == there
    assert open_images(str(tmp_path / "there/*.tar")).class_names == ["Sommer, ß", "猫 cat"]


@pytest.mark.slow
def test_training_and_export_write_utf8_in_every_locale(
    locale: dict[str, str], tiny_config_file: Path, tmp_path: Path
) -> None:
    codes = Path(shutil.copy(tiny_config_file.parent / "codes.jsonl", tmp_path))
    store = open_tokens(codes, *SIZES)
    store.meta.class_names = ["été", "ß", "ñ", "猫", "λ"]
    write_meta(store.path, store.meta)
    config = tmp_path / "a.yaml"
    config.write_text(f"{tiny_config_file.read_text()}\n", encoding="utf-8")
    text = config.read_text(encoding="utf-8").replace("name: rear", "name: été 猫 λ")
    config.write_bytes(BOM_UTF8 + text.encode())
    folder = tmp_path / "run"
    arguments = [f"config={config}", f"experiment.output_dir={folder}", "training.max_train_steps=1"]
    arguments.append(f"dataset.params.pretokenization={store.path}")
    assert run(locale, "scripts/train_rear.py", *arguments)[0] == 0
    assert read_yaml(folder / "config.yaml")["experiment.name"] == "été 猫 λ"
    assert load_config([f"config={folder / 'config.yaml'}"]).experiment.name == "été 猫 λ"
    assert run(locale, "scripts/export_model.py", str(folder), str(tmp_path / "exported"), "--samples", "2")[0] == 0
    assert read_json(tmp_path / "exported/classes.json") == store.meta.class_names
    assert "été 猫 λ" in (tmp_path / "exported/README.md").read_text(encoding="utf-8")


def test_a_name_that_the_locale_lacks_is_one_line(locale: dict[str, str], tmp_path: Path) -> None:
    if "GB18030" in locale["LC_ALL"]:
        pytest.skip("GB18030 has all letters")
    status, errors = run(locale, "-c", LOCK_A_CAT, str(tmp_path))
    assert status == 1
    assert errors.startswith(f"error: {tmp_path}/\\u732b")
    assert "PYTHONUTF8=1" in errors
    assert len(errors.splitlines()) == 1


def test_a_byte_order_mark_changes_nothing(tiny_config_file: Path, tmp_path: Path) -> None:
    def with_mark(path: Path) -> Path:
        marked = tmp_path / path.name
        marked.write_bytes(BOM_UTF8 + path.read_bytes())
        return marked

    codes = tiny_config_file.parent / "codes.jsonl"
    (tmp_path / "plain").mkdir()
    plain = open_tokens(Path(shutil.copy(codes, tmp_path / "plain")), *SIZES)
    assert open_tokens(with_mark(codes), *SIZES).fingerprint == plain.fingerprint
    assert read_yaml(with_mark(tiny_config_file)) == read_yaml(tiny_config_file)
    assert read_json(with_mark(plain.path / "meta.json")) == read_json(plain.path / "meta.json")
    store = shutil.copytree(plain.path, tmp_path / "marked.tokens")
    shutil.copy(tmp_path / "meta.json", store)
    assert TokenStore(store).fingerprint == plain.fingerprint


def test_text_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("n01 Café\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"names\.txt: .* not UTF-8 at byte 7"):
        read_text(tmp_path / "names.txt")


def test_accents_of_macos_and_linux_are_equal(tiny_arguments: list[str], tmp_path: Path) -> None:
    """In names of folders, in a --class-names file, as a class to sample, and of held-out images."""
    folders = {}
    for name, cafe in (("train", NFD), ("validation", NFC)):
        folders[name] = make_noise_images(tmp_path / name, 3, 16, 16)
        (folders[name] / "cat").rename(folders[name] / cafe)
    (tmp_path / "names.txt").write_text(f"{NFC} {NFD} au lait\ndog dog\n", encoding="utf-8")
    assert open_images(str(folders["train"])).class_names == [NFC, "dog"]
    make_shards.main([str(folders["train"]), str(tmp_path / "out"), "--class-names", str(tmp_path / "names.txt")])
    assert read_json(tmp_path / "out/classes.json") == [f"{NFC} au lait", "dog"]
    (tmp_path / "out/classes.json").write_text(json.dumps([f"{NFD} au lait", "dog"]))
    assert open_images(f"{tmp_path}/out/*.tar").class_names == [f"{NFC} au lait", "dog"]
    images = [f"dataset.params.train_shards_path_or_url={folders['train']}"]
    images += [f"dataset.params.eval_shards_path_or_url={folders['validation']}", "experiment.eval_every=1"]
    config = load_config([*tiny_arguments, *images, "dataset.params.pretokenization=null", "experiment.output_dir=x"])
    assert np.unique(open_validation_data(config, "").class_ids).tolist() == [0, 1]
    for cafe in (NFC, NFD):
        config.sampling.class_labels = ["dog", cafe]
        assert asked_classes(config, None) == [1, 0]


@pytest.mark.parametrize("cafe", [NFC, NFD])
def test_the_names_of_a_store_are_compared_in_the_same_way(
    tiny_config_file: Path, tiny_arguments: list[str], tmp_path: Path, cafe: str
) -> None:
    store = open_tokens(Path(shutil.copy(tiny_config_file.parent / "codes.jsonl", tmp_path)), *SIZES)
    store.meta.class_names = ["a", cafe, "c", "d", "e"]
    write_meta(store.path, store.meta)
    config = load_config([*tiny_arguments, f"dataset.params.pretokenization={store.path}", "experiment.output_dir=x"])
    config.sampling.class_labels = [NFD]
    assert asked_classes(config, None) == [1]


def test_the_home_folder_in_a_file_and_on_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {
        "experiment.output_dir": "~/run",
        "experiment.tokenizer_checkpoint": "~/tokenizer.bin",
        "dataset.params.pretokenization": "~/codes.tokens",
        "dataset.params.train_shards_path_or_url": "~/a-{000..002}.tar",
    }
    tree = OmegaConf.create()
    for name, value in paths.items():
        OmegaConf.update(tree, name, value)
    OmegaConf.save(tree, tmp_path / "a.yaml")
    from_file = load_config(["config=~/a.yaml"])
    assert from_file == load_config([f"{name}={value}" for name, value in paths.items()])
    assert from_file.experiment.output_dir == str(tmp_path / "run")
    assert from_file.dataset.params.train_shards_path_or_url == str(tmp_path / "a-{000..002}.tar")
    with_reference = load_config(["config=~/a.yaml", "experiment.generator_checkpoint=${experiment.output_dir}/w"])
    assert with_reference.experiment.generator_checkpoint == str(tmp_path / "run/w")
    make_noise_images(tmp_path / "images", 2, 8, 8)
    arguments = make_shards.parse_arguments(["~/images", "~/out", "--class-names=~/names.txt"])
    assert [arguments.source, arguments.class_names] == [tmp_path / "images", tmp_path / "names.txt"]
    assert make_shards.parse_arguments(["--index=~/a.tar"]).index == str(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["a[1]", "x{1..2}", "b*", "c?", "{d", "e}", "~"])
def test_an_existing_path_comes_before_patterns(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    make_shards.main([str(make_noise_images(folder / "images", 2, 8, 8)), str(folder / "out")])
    shutil.copytree(folder, tmp_path / "b1")  # what the name as a pattern would find
    expected = [folder / "out/train-000000.tar"]
    for pattern in ("train-000000.tar", "train-*.tar", "train-{000000..000000}.tar", "train-00000[0].tar"):
        assert find_shards(f"{folder}/out/{pattern}") == expected
    expected[0].rename(folder / f"out/{name}.tar")
    assert find_shards(f"{folder}/out/{name}.tar") == [folder / f"out/{name}.tar"]
    assert len(open_images(str(folder / "images"))) == 4


def test_patterns_over_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").touch()
    both = [tmp_path / "a/0.tar", tmp_path / "b/0.tar"]
    for pattern in ("{a,b}/0.tar", "?/*.tar", "[ab]/0.tar", "{a/0,b/0}.tar", "*/{0..0}.tar"):
        assert find_shards(f"{tmp_path}/{pattern}") == both
    with pytest.raises(InputError, match=r"c/0\.tar: no such shard"):
        find_shards(f"{tmp_path}/{{a,c}}/0.tar")
    long = ",".join(f"{i:0250d}" for i in range(3))  # longer than a file name may be
    with pytest.raises(InputError, match="no such shard"):
        find_shards(f"{tmp_path}/{{{long}}}.tar")
