"""Images from shards and folders: what is read, and that every damage is named."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import default_collate

from data.batch_sampler import SampleIndex
from data.images.reading import ImageDataset, open_images
from data.images.transforms import pretokenize_transform, training_transform
from data.loading import Batches
from scripts import make_shards
from tests.data.images.made_up_shards import write_tar
from utils.errors import InputError
from utils.schema import PreprocessingConfig


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((10, 12, 3), value, dtype=np.uint8))


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def write_shard(path: Path, samples: list[dict[str, str | bytes]]) -> Path:
    with path.open("wb") as stream, webdataset.TarWriter(stream, mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Six samples in two shards; sample i has class i % 3 and the grey value 20 i."""
    samples = [{"__key__": f"dir/{i}", "png": encode(picture(20 * i)), "cls": str(i % 3)} for i in range(6)]
    write_shard(tmp_path / "a-000000.tar", samples[:4])
    write_shard(tmp_path / "a-000001.tar", samples[4:])
    return tmp_path


def values(source: object) -> list[int]:
    return [image.getpixel((0, 0))[0] for image, _ in (source[i] for i in range(len(source)))]


@pytest.mark.parametrize("pattern", ["a-{000000..000001}.tar", "a-*.tar"])
def test_shards(shards: Path, pattern: str) -> None:
    (shards / "classes.json").write_text(json.dumps(["x", "y", "z"]))
    source = pickle.loads(pickle.dumps(open_images(str(shards / pattern))))
    assert values(source) == [0, 20, 40, 60, 80, 100]
    assert [source[i][1] for i in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [source.key(i) for i in (0, 5)] == ["dir/0", "dir/5"]
    assert source.class_names == ["x", "y", "z"]
    assert source[1][0].size == (12, 10)


def test_other_members_and_formats(tmp_path: Path) -> None:
    grey = encode(picture(100).convert("L"), "JPEG")
    sample = {"__key__": "a", "JPEG": grey, "cls": "2\n", "json": b"{}", "seg.png": b"mask"}
    source = open_images(str(write_shard(tmp_path / "a.tar", [sample])))
    assert len(source) == 1
    assert source[0][0].mode == "RGB"
    assert source[0][1] == 2
    assert source.class_names is None


def test_folder(tmp_path: Path) -> None:
    for name, value in (("b/1.png", 1), ("a/2.PNG", 2), ("a/1.png", 3)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode(picture(value)))
    (tmp_path / "a/notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    source = open_images(str(tmp_path))
    assert source.class_names == ["a", "b"]
    assert [source.key(i) for i in range(3)] == ["a/1.png", "a/2.PNG", "b/1.png"]
    assert [source[i][1] for i in range(3)] == [0, 0, 1]
    assert values(source) == [3, 2, 1]


def test_loader_workers(shards: Path) -> None:
    source = open_images(str(shards / "a-*.tar"))
    dataset = ImageDataset(
        source,
        training_transform(
            PreprocessingConfig(resize_shorter_edge=8, crop_size=8, random_crop=False, random_flip=False)
        ),
        seed=0,
    )
    batches = [list(range(len(dataset)))[i : i + 4] for i in range(0, len(dataset), 4)]
    sent = pickle.loads(pickle.dumps(dataset))  # as to a worker that is spawned
    for batch, expected in zip(Batches(sent, batches, 2), Batches(dataset, batches, 0), strict=True):
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].shape[1:] == (8, 8, 3)
        for key, value in expected.items():
            torch.testing.assert_close(batch[key], value)


@pytest.mark.parametrize(
    ("transform", "per_image"), [(training_transform, 16 * 16 * 3), (pretokenize_transform, 17 * 17 * 3)]
)
def test_shared_memory_of_a_batch_is_its_bytes(shards: Path, transform: Callable, per_image: int) -> None:
    """As floats they were 4 times as many, as ten crops 35 times."""
    dataset = ImageDataset(
        open_images(str(shards / "a-*.tar")),
        transform(PreprocessingConfig(resize_shorter_edge=16, crop_size=16)),
        seed=0,
    )
    images = next(Batches(dataset, [[0, 1, 2, 3]], 1))["image"]
    assert images.is_shared()
    assert images.untyped_storage().nbytes() == 4 * per_image


def test_augmentation_is_keyed_by_pass_and_index(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [encode(Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))) for _ in range(2)]
    write_shard(tmp_path / "a.tar", [{"__key__": str(i), "png": noise[0], "cls": "0"} for i in range(2)])
    source = open_images(str(tmp_path / "a.tar"))
    transform = training_transform(
        PreprocessingConfig(resize_shorter_edge=40, crop_size=8, random_crop=True, random_flip=True)
    )
    dataset, other_seed = ImageDataset(source, transform, seed=1), ImageDataset(source, transform, seed=2)
    image = lambda data, item: data[item]["image"].numpy().tobytes()  # noqa: E731
    assert image(dataset, 1) == image(dataset, 1) == image(dataset, SampleIndex(1, 0))
    crops = [
        image(dataset, SampleIndex(0, 0)),
        image(dataset, SampleIndex(1, 0)),
        image(dataset, SampleIndex(1, 1)),
        image(other_seed, 1),
    ]
    assert len(set(crops)) == 4


def other_shard(folder: Path) -> Path:
    return write_shard(folder / "other.tar", [{"__key__": "three", "png": encode(picture(7)), "cls": "2"}])


def damaged(folder: Path, case: str) -> Path:
    """A shard `bad.tar` with one kind of damage in its second sample."""
    path, png = folder / "bad.tar", encode(picture(7))
    second = {"__key__": "two", "png": png, "cls": "1"}
    changes = {
        "no cls": {"cls": None},
        "no image": {"png": None},
        "two images": {"jpg": png},
        "cls no number": {"cls": "dog"},
        "cls negative": {"cls": "-1"},
        "undecodable": {"png": b"not an image"},
        "truncated image": {"png": png[:-30]},
    }
    second |= changes.get(case, {})
    samples = [{"__key__": "one", "png": png, "cls": "0"}, {k: v for k, v in second.items() if v is not None}]
    write_shard(path, [] if case == "empty shard" else samples)
    whole = path.read_bytes()
    member_end = 2 * 512 + 512 + 512  # headers and contents of the first sample: .cls, .png
    contents = {
        "empty file": b"",
        "garbage": b"x" * 5000,
        "cut in a member": whole[: member_end + 512 + 100],
        "cut in a header": whole[: member_end + 100],
        "cut between members": whole[:member_end],
        "garbage inside": whole[:member_end] + b"x" * 512 + whole[member_end + 512 :],
        "joined by cat": whole + other_shard(folder).read_bytes(),
        "zeros inside": whole[:member_end] + bytes(512) + whole[member_end:],
        "garbage after": whole + b"x",
    }
    path.write_bytes(contents.get(case, whole))
    return path


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("no cls", "'two'.*no class id"),
        ("no image", "'two'.*no image"),
        ("two images", "'two'.*two images"),
        ("cls no number", "two.*dog"),
        ("cls negative", "two.*-1"),
        ("empty shard", "no jpg"),
        ("empty file", "empty"),
        ("garbage", "complete, plain tar"),
        ("cut in a member", "unexpected end of data, after 1 images"),
        ("cut in a header", "after 1 images"),
        ("cut between members", "at byte 2048, after 1 images"),
        ("garbage inside", "at byte 2048, after 1 images"),
        ("joined by cat", "data after the end mark at byte 4096, after 2 images"),
        ("zeros inside", "data after the end mark at byte 2048, after 1 images"),
        ("garbage after", "data after the end mark at byte 4096, after 2 images"),
        ("undecodable", "'two'.*cannot decode"),
        ("truncated image", "'two'.*cannot decode"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path: Path, case: str, expected: str) -> None:
    path = damaged(tmp_path, case)
    with pytest.raises(InputError, match=f"^{path}.*{expected}") as error:
        values(open_images(str(path)))
    assert "\n" not in str(error.value)
    if "decode" not in expected:
        with pytest.raises(InputError, match=f"^{path}.*{expected}"):
            make_shards.main(["--index", str(path), "--processes", "1"])
        assert not path.with_suffix(".index.npz").exists()


def test_a_sample_in_two_shards_names_both(shards: Path) -> None:
    copy = shards / "a-000001 (1).tar"
    copy.write_bytes((shards / "a-000001.tar").read_bytes())
    for indexed in (False, True):
        with pytest.raises(InputError, match=r"found 2 keys") as error:
            open_images(str(shards / "a-*.tar"))
        for path in (copy, shards / "a-000001.tar"):
            assert f"{path}, sample 'dir/4'" in str(error.value)
        if not indexed:
            make_shards.main(["--index", str(shards / "a-*.tar"), "--processes", "1"])
    with pytest.raises(InputError, match=r"0,0}\.tar: found .*a-000000\.tar twice"):
        open_images(str(shards / "a-00000{0,0}.tar"))
    copy.unlink()
    copy.symlink_to("a-000001.tar")
    with pytest.raises(InputError, match=r"found 2 keys"):
        open_images(str(shards / "a-*.tar"))


def test_two_class_ids_of_one_sample_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.cls": b"0", "1.png": encode(picture(1))})
    with tarfile.open(path, "a") as tar:  # as `tar --append` of a corrected file
        member = tarfile.TarInfo("1.cls")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"1"))
    with pytest.raises(InputError, match=r"a\.tar, sample '1': found two class ids, expected one"):
        open_images(str(path))


def test_a_folder_in_the_place_of_a_class_id_is_none(tmp_path: Path) -> None:
    (tmp_path / "one.cls").mkdir()
    (tmp_path / "one.png").write_bytes(b"pixels")
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name in ("one.cls", "one.png"):
            tar.add(tmp_path / name, name)
    with pytest.raises(InputError, match=r"bad\.tar, sample 'one': found no class id \(\.cls\)"):
        open_images(str(tmp_path / "bad.tar"))


def test_missing_paths(shards: Path) -> None:
    with pytest.raises(InputError, match=r"a-\{000000\.\.000003\.tar: expected balanced braces, as in train-"):
        open_images(str(shards / "a-{000000..000003.tar"))
    with pytest.raises(InputError, match=r"a-000002.tar: no such shard; .* with 2 .tar files"):
        open_images(str(shards / "a-{000000..000003}.tar"))
    with pytest.raises(InputError, match=f"nearest folder is {shards}"):
        open_images(str(shards / "no/such/b-*.tar"))
    with pytest.raises(InputError, match=r"no sub-folder.*\*\.tar"):
        open_images(str(shards))
    (shards / "classes").mkdir()
    with pytest.raises(InputError, match="classes: found no image"):
        open_images(str(shards))


def test_class_ids_must_fit(shards: Path) -> None:
    pattern = str(shards / "a-*.tar")
    assert len(open_images(pattern, num_classes=3)) == 6
    with pytest.raises(InputError, match=r"'dir/2': found class id 2, expected less than 2"):
        open_images(pattern, num_classes=2)
    (shards / "classes.json").write_text('["x"]')
    with pytest.raises(InputError, match="expected less than 1"):
        open_images(pattern)
    (shards / "classes.json").write_text('{"x": 0}')
    with pytest.raises(InputError, match=r"classes.json: .*list of class names"):
        open_images(pattern)


def test_shard_changed_after_opening(shards: Path) -> None:
    source = open_images(str(shards / "a-*.tar"))
    (shards / "a-000001.tar").write_bytes(b"short")
    with pytest.raises(InputError, match="changed after it was opened"):
        source[5]


def test_images_whose_names_have_several_dots_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ("a/22.png", "a/22.cls", "a/22.05.png", "a/22.05.cls")
    path = write_tar(tmp_path / "a.tar", {name: encode(picture(1)) if name.endswith("png") else b"0" for name in names})
    assert len(open_images(str(path))) == 1
    notices = capsys.readouterr().err
    assert "skipped 2 files" in notices
    assert "a/22.05.png" in notices


def test_members_left_out_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    png = encode(picture(1))
    hidden = {"./a/._1.png": b"AppleDouble", ".x/2.png": png, "__MACOSX/a/._1.cls": b"AppleDouble"}
    members = {"./a/1.png": png, "./a/1.cls": b"0", **hidden, "a/1.json": b"{}", "./a/1.seg.png": png}
    source = open_images(str(write_tar(tmp_path / "a.tar", members)))
    assert [source.key(i) for i in range(len(source))] == ["./a/1"]
    said = capsys.readouterr().err
    assert "skipped 2 files (no image extension after the first dot), such as a/1.json" in said
    assert "skipped 3 files (hidden, or added by a system), such as ./a/._1.png" in said


@pytest.mark.parametrize("indexed", [False, True])
def test_classes_by_name(tmp_path: Path, indexed: bool) -> None:
    """As webdataset's ShardWriter writes texts; the ids are those of the sorted names of all shards."""
    names = ["dog", "cat", "dog", "éland"]
    with webdataset.ShardWriter(f"{tmp_path}/a-%06d.tar", maxcount=2, verbose=0) as writer:
        for i, name in enumerate(names):
            writer.write({"__key__": str(i), "jpg": picture(20 * i), "cls": name if i else b"dog", "json": {"id": i}})
    pattern = str(tmp_path / "a-*.tar")
    if indexed:
        make_shards.main(["--index", pattern, "--processes", "1"])
    source = open_images(pattern)
    assert source.class_names == ["cat", "dog", "éland"]
    assert source.class_ids.tolist() == [1, 0, 1, 2]
    (tmp_path / "classes.json").write_text('["éland", "dog", "cat"]')
    assert open_images(pattern).class_ids.tolist() == [1, 2, 1, 0]
    (tmp_path / "classes.json").write_text('["dog", "cat"]')
    with pytest.raises(InputError, match=r"a-000001\.tar: found the class 'éland', expected one of classes\.json"):
        open_images(pattern)
    (tmp_path / "classes.json").unlink()
    write_shard(tmp_path / "a-000002.tar", [{"__key__": "9", "png": encode(picture(1)), "cls": "7"}])
    with pytest.raises(InputError, match=r"a-000002\.tar: found classes by number, expected names as in .*a-000000"):
        open_images(pattern)


@pytest.mark.parametrize("field", ["cls", "label", "class"])
def test_classes_in_records_as_img2dataset_writes_them(tmp_path: Path, field: str) -> None:
    """A .jpg, a caption and a record of each image, in its order of members; no .cls."""
    members = {}
    for i in range(3):
        record = {"caption": "a dog", "url": "https://x/1.jpg", "key": f"{i:09d}", "status": "success", field: 2 - i}
        contents = {"jpg": encode(picture(i)), "json": json.dumps(record).encode(), "txt": b"a dog"}
        members |= {f"{i:09d}.{kind}": content for kind, content in contents.items()}
    path = write_tar(tmp_path / "00000.tar", members)
    assert open_images(str(path)).class_ids.tolist() == [2, 1, 0]
    for record, message in (
        (b"{}", r"found no field cls, label, class"),
        (b"{", "found no JSON"),
        (b'{"cls": -1}', "found '-1', expected a number"),
        (b'{"cls": 1.5}', r"found '1\.5', expected a number"),
    ):
        write_tar(path, members | {"000000001.json": record})
        with pytest.raises(InputError, match=rf"00000\.tar, member '000000001\.json': {message}"):
            open_images(str(path))


def test_images_of_other_names(tmp_path: Path) -> None:
    """An image need not be the first extension, if it is the only one of its sample."""
    png = encode(picture(60))
    path = write_tar(tmp_path / "a.tar", {"1.image.png": png, "1.cls": b"1", "2.cls": b"0", "2.img.png": png})
    source = open_images(str(path))
    assert [source.key(i) for i in range(2)] == ["1", "2"]
    assert source.class_ids.tolist() == [1, 0]
    assert values(source) == [60, 60]
    write_tar(path, {"1.image.png": png, "1.mask.png": png, "1.cls": b"1"})
    with pytest.raises(InputError, match=r"sample '1': found the images 1\.image\.png, 1\.mask\.png, expected one"):
        open_images(str(path))


def test_a_linked_member_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.png": encode(picture(1)), "1.cls": b"0", "2.cls": b"0"})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("2.png")
        member.type, member.linkname = tarfile.LNKTYPE, "1.png"
        tar.addfile(member)
    with pytest.raises(InputError, match="sample '2': found no image"):
        open_images(str(path))


def test_unreadable_images_are_skipped_up_to_a_fraction(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    samples = [{"__key__": str(i), "png": encode(picture(i)) if i != 1 else b"broken", "cls": str(i)} for i in range(4)]
    source = open_images(str(write_shard(tmp_path / "a.tar", samples)))
    transform = training_transform(
        PreprocessingConfig(resize_shorter_edge=8, crop_size=8, random_crop=False, random_flip=False)
    )
    dataset = ImageDataset(source, transform, seed=0, max_bad_fraction=0.25)
    for _ in range(2):
        batch = default_collate([dataset[i] for i in range(4)])
        dataset.skipped.add(batch["index"], batch["skipped"])
    assert batch["skipped"].tolist() == [False, True, False, False]
    assert batch["class_labels"].tolist() == [0, 2, 2, 3]
    assert torch.equal(batch["image"][1], batch["image"][2])
    assert dataset.skipped.count == 2
    assert capsys.readouterr().err.count("sample '1'") == 1
    strict = ImageDataset(source, transform, seed=0, max_bad_fraction=0.2)
    with pytest.raises(InputError, match="1 of 4 images cannot be decoded"):
        strict.skipped.add(batch["index"], batch["skipped"])
