"""The sampler: any number of processes and images, the same npz."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.loading import load_generator, load_tokenizer
from modeling.rear import ReAR
from modeling.sampling.cached_decoding import DecodingState
from modeling.sampling.generate import CodeSampler
from modeling.sampling.image_sampler import ImageSampler
from scripts import make_shards, sample_imagenet_rear
from tests.processes import ROOT, STANDALONE, rank_environments, run_script, start_script
from utils.config import load_config
from utils.errors import InputError
from utils.files.sample_chunks import SampleChunks
from utils.files.weights import load_state_dict, save_weights
from utils.run import image_provenance

SCRIPT = "scripts/sample_imagenet_rear.py"


@pytest.fixture(scope="module")
def checkpoint(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, projectors included, as the trainer and the published files have them."""
    config = load_config([*tiny_arguments, "experiment.output_dir=unused"])
    torch.manual_seed(0)
    model = ReAR(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(model.state_dict(), path)
    return path


def arguments_of(tiny_arguments: list[str], checkpoint: Path, output: Path, *overrides: str) -> list[str]:
    return [
        *tiny_arguments,
        f"experiment.output_dir={output}",
        f"experiment.generator_checkpoint={checkpoint}",
        *overrides,
    ]


def sample(tiny_arguments: list[str], checkpoint: Path, output: Path, *overrides: str) -> Path:
    sample_imagenet_rear.main(load_config(arguments_of(tiny_arguments, checkpoint, output, *overrides)))
    return output.with_name(output.name + ".npz")


def torchrun(tiny_arguments: list[str], checkpoint: Path, output: Path, *overrides: str, processes: int) -> Path:
    command = [sys.executable, "-m", *STANDALONE, f"--nproc_per_node={processes}"]
    command += [str(ROOT / SCRIPT)]
    command += arguments_of(tiny_arguments, checkpoint, output, *overrides)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return output.with_name(output.name + ".npz")


@pytest.fixture(scope="module")
def npz(tiny_arguments: list[str], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample(tiny_arguments, checkpoint, tmp_path_factory.mktemp("reference") / "samples")


def test_npz_has_what_the_adm_evaluator_reads(npz: Path) -> None:
    arrays = np.load(npz)
    assert arrays["arr_0"].shape == (37, 16, 16, 3)
    assert arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [i % 5 for i in range(37)]
    assert len(np.unique(arrays["arr_0"], axis=0)) > 30
    assert sorted(path.name for path in npz.parent.iterdir()) == [
        f"samples.{kind}" for kind in ("json", "npz", "png", "yaml")
    ]
    assert Image.open(npz.parent / "samples.png").size[0] >= 10 * 16


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_batch_size_changes_nothing(
    tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path, batch_size: int
) -> None:
    other = sample(tiny_arguments, checkpoint, tmp_path / "x", f"sampling.per_gpu_batch_size={batch_size}")
    assert other.read_bytes() == npz.read_bytes()


@pytest.mark.multiprocess
def test_number_of_processes_changes_nothing(
    tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path
) -> None:
    assert torchrun(tiny_arguments, checkpoint, tmp_path / "x", processes=2).read_bytes() == npz.read_bytes()
    done = run_script([SCRIPT, *arguments_of(tiny_arguments, checkpoint, tmp_path / "y")], tmp_path, processes=3)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "y.npz").read_bytes() == npz.read_bytes()


@pytest.mark.multiprocess
def test_orders_belong_to_the_images_too(
    tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path
) -> None:
    arguments = [*tiny_arguments, "model.generator.order=random", "sampling.order=random"]
    alone = sample(arguments, checkpoint, tmp_path / "x", "sampling.per_gpu_batch_size=37")
    done = run_script([SCRIPT, *arguments_of(arguments, checkpoint, tmp_path / "y")], tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "y.npz").read_bytes() == alone.read_bytes()
    assert not np.array_equal(np.load(alone)["arr_0"], np.load(npz)["arr_0"])


def test_a_seed_or_a_class_more_changes_the_images(
    tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path
) -> None:
    other = sample(tiny_arguments, checkpoint, tmp_path / "x", "sampling.seed=1")
    assert not np.array_equal(np.load(other)["arr_0"], np.load(npz)["arr_0"])


def test_fewer_images_are_the_first_ones(
    tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path
) -> None:
    other = sample(tiny_arguments, checkpoint, tmp_path / "x", "sampling.num_fid_samples=3")
    assert np.array_equal(np.load(other)["arr_0"], np.load(npz)["arr_0"][:3])


def test_the_last_batch_does_not_depend_on_what_was_sampled_before(
    tiny_arguments: list[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is allocated, compiled or captured for it."""
    sizes, prepare = [], CodeSampler._prepare

    def recording(sampler: CodeSampler, images: int) -> DecodingState:
        sizes.append(images)
        return prepare(sampler, images)

    monkeypatch.setattr(CodeSampler, "_prepare", recording)
    few = ["sampling.num_fid_samples=11", "sampling.per_gpu_batch_size=4"]
    config = load_config(arguments_of(tiny_arguments, checkpoint, Path("unused"), *few))
    model, tokenizer = load_generator(checkpoint, config.model).eval(), load_tokenizer(config)
    chunks = [range(4), range(4, 8), range(8, 11)]
    several, one = (ImageSampler(model, tokenizer, config, 4, print) for _ in range(2))
    *_, (_, images) = sample_imagenet_rear.sample_chunks(chunks, list(range(11)), several, config)
    [(chunk, alone)] = sample_imagenet_rear.sample_chunks(chunks[-1:], list(range(11)), one, config)
    assert (chunk, len(alone)) == (range(8, 11), 3)
    assert np.array_equal(images, alone)
    assert sizes == [4, 4]


def test_some_classes_alone_are_the_same_images(
    tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path
) -> None:
    asked = ["sampling.class_labels=[3,1]", "sampling.images_per_class=7"]
    alone = np.load(sample(tiny_arguments, checkpoint, tmp_path / "x", *asked))
    everything = np.load(npz)
    assert alone["arr_1"].tolist() == [3, 1] * 7
    for label in (3, 1):
        images = everything["arr_0"][everything["arr_1"] == label]
        np.testing.assert_array_equal(alone["arr_0"][alone["arr_1"] == label], images[:7])
    assert "class_labels:\n  - '3'" in (tmp_path / "x.yaml").read_text()

    in_all = sample(tiny_arguments, checkpoint, tmp_path / "y", asked[0], "sampling.num_fid_samples=3")
    assert np.load(in_all)["arr_1"].tolist() == [3, 1, 3]
    each = sample(tiny_arguments, checkpoint, tmp_path / "z", "sampling.images_per_class=2")
    np.testing.assert_array_equal(np.load(each)["arr_0"], everything["arr_0"][:10])
    with pytest.raises(InputError, match=r"x\.npz: .*sampling\.class_labels: found \[3, 1\]"):
        sample(tiny_arguments, checkpoint, tmp_path / "x", "sampling.class_labels=[1,3]", asked[1])


def test_classes_by_name(tiny_arguments: list[str], checkpoint: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog", "12"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / name / "0.png")
    data = f"dataset.params.train_shards_path_or_url={tmp_path / 'images'}"
    arguments = [*tiny_arguments, "sampling.images_per_class=2"]
    named = sample(arguments, checkpoint, tmp_path / "x", data, "sampling.class_labels=[dog,cat]")
    assert np.load(named)["arr_1"].tolist() == [2, 1, 2, 1]
    before = named.stat().st_mtime_ns
    sample(arguments, checkpoint, tmp_path / "x", "sampling.class_labels=[2,1]")  # the same
    assert named.stat().st_mtime_ns == before
    message = r"class_labels: found 'dgo', expected 0 to 4 or .* of .*images; did you mean 'dog'"
    with pytest.raises(InputError, match=message):
        sample(tiny_arguments, checkpoint, tmp_path / "y", data, "sampling.class_labels=[dgo]")


def test_a_name_of_two_classes_is_none(tiny_arguments: list[str], checkpoint: Path, tmp_path: Path) -> None:
    """As "crane" among ImageNet's titles: bird and machine."""
    data = tmp_path / "images"
    for name in ("0", "1", "2"):
        (data / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(data / name / "0.png")
    (tmp_path / "titles.txt").write_text("0 crane\n1 2\n2 crane\n")
    make_shards.main([str(data), str(tmp_path / "shards"), "--class-names", str(tmp_path / "titles.txt")])
    arguments = [*tiny_arguments, f"dataset.params.train_shards_path_or_url={tmp_path / 'shards/*.tar'}"]
    with pytest.raises(InputError, match=r"class_labels: found 'crane', the name of the classes \[0, 2\] of .*shards"):
        sample(arguments, checkpoint, tmp_path / "x", "sampling.class_labels=[crane]")
    assert not list(tmp_path.glob("x*"))
    npz = sample(arguments, checkpoint, tmp_path / "x", "sampling.class_labels=[2]", "sampling.images_per_class=1")
    assert np.load(npz)["arr_1"].tolist() == [2]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            "[0,5]",
            r"class_labels: found '5', expected 0 to 4 or the name of a class of the training data",
        ),
        ("[-1]", r"class_labels: found '-1', expected 0 to 4"),
        ("[cat]", r"class_labels: found 'cat', expected 0 to 4"),
        ("[2,2]", r"class_labels: found class 2 twice"),
        ("[]", r"class_labels=\[\]: expected at least one class"),
        ("3", r"class_labels=3: expected list of text"),
        ("[010]", r"class_labels: found '010', expected 0 to 4"),
        ("[no]", r"class_labels: found 'no', expected 0 to 4"),
    ],
)
def test_classes_that_are_not_there(
    tiny_arguments: list[str], checkpoint: Path, tmp_path: Path, asked: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sample(tiny_arguments, checkpoint, tmp_path / "x", f"sampling.class_labels={asked}")
    assert list(tmp_path.iterdir()) == []


def test_missing_and_foreign_weights_are_named(tiny_arguments: list[str], checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"generator_checkpoint: missing"):
        sample_imagenet_rear.main(load_config([*tiny_arguments, f"experiment.output_dir={tmp_path / 'x'}"]))
    with pytest.raises(InputError, match=r"absent\.safetensors"):
        sample(tiny_arguments, tmp_path / "absent.safetensors", tmp_path / "x")
    with pytest.raises(InputError, match=r"model\.safetensors.*blocks\.2"):
        sample(tiny_arguments, checkpoint, tmp_path / "x", "model.generator.num_hidden_layers=3")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("broken", "what"), [("model", "generator's logits"), ("tokenizer", "tokenizer's pixels")])
def test_values_that_are_not_finite_name_the_images_and_the_weights(
    tiny_arguments: list[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, what: str
) -> None:
    """Damaged after loading, since a file with such values is refused."""
    load = {"model": "load_generator", "tokenizer": "load_tokenizer"}[broken]
    original = getattr(sample_imagenet_rear, load)

    def damaged(*arguments: object) -> torch.nn.Module:
        module = original(*arguments)
        head = module.lm_head if broken == "model" else module.decoder.conv_out
        head.bias.data[1] = torch.nan
        return module

    monkeypatch.setattr(sample_imagenet_rear, load, damaged)
    with pytest.raises(InputError, match=rf"images 0 to 7: the {what} are not finite.*generator_checkpoint=") as caught:
        sample(tiny_arguments, checkpoint, tmp_path / "x")
    assert str(checkpoint) in str(caught.value)
    assert "tokenizer.safetensors" in str(caught.value)
    assert not list(tmp_path.glob("*.npz"))


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[range]:
    """Let `count` chunks be saved; the next one crashes. Returns the list of chunks that were asked for."""
    asked, save = [], SampleChunks.save

    def save_some(self: SampleChunks, chunk: range, images: np.ndarray) -> None:
        asked.append(chunk)
        if len(asked) > count:
            raise OSError("the disk is gone")
        save(self, chunk, images)

    monkeypatch.setattr(SampleChunks, "save", save_some)
    return asked


def test_a_run_resumes_where_it_ended(
    tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(OSError, match="the disk is gone"):
            sample(tiny_arguments, checkpoint, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x.chunks"]
    asked = interrupt_after(monkeypatch, 5)
    assert sample(tiny_arguments, checkpoint, tmp_path / "x").read_bytes() == npz.read_bytes()
    assert asked == [range(16, 24), range(24, 32), range(32, 37)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npz", "x.png", "x.yaml"]


def test_a_damaged_chunk_is_made_again(
    tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(OSError, match="the disk is gone"):
            sample(tiny_arguments, checkpoint, tmp_path / "x")
    chunks = SampleChunks(tmp_path / "x.chunks", 37, 8)
    damaged = [chunks.path(chunk) for chunk in chunks.chunks[1:4]]
    content = damaged[0].read_bytes()
    for path, now in zip(damaged, (content[:-40], b"", b"\0" * len(content)), strict=True):
        path.write_bytes(now)
    asked = interrupt_after(monkeypatch, 5)
    assert sample(tiny_arguments, checkpoint, tmp_path / "x").read_bytes() == npz.read_bytes()
    assert asked == chunks.chunks[1:]
    printed = capsys.readouterr().out
    assert all(f"{path}: damaged" in printed for path in damaged)


def test_killed_while_packing(
    tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SampleChunks, "load", lambda self: iter([np.zeros((37, 16, 16, 3), np.uint8), 1 / 0]))
        with pytest.raises(ZeroDivisionError):
            sample(tiny_arguments, checkpoint, tmp_path / "x")
    assert not list(tmp_path.glob("x.npz*"))
    asked = interrupt_after(monkeypatch, 0)
    assert sample(tiny_arguments, checkpoint, tmp_path / "x").read_bytes() == npz.read_bytes()
    assert asked == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.seed=1", r"sampling\.seed: found 42, expected 1;"),
        ("model.generator.guidance_scale=2", r"model\.generator\.guidance_scale: found 14\.5, expected 2\.0"),
        ("sampling.per_gpu_batch_size=4", r"sampling\.per_gpu_batch_size: found 8, expected 4"),
        ("other code", r"code: found [0-9a-f]{64}, expected 0ther"),
        ("other weights", r"sha256 of experiment\.generator_checkpoint: found [0-9a-f]{64}, expected [0-9a-f]{64}"),
    ],
)
def test_chunks_of_another_run_are_refused(
    tiny_arguments: list[str],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    message: str,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(OSError, match="the disk is gone"):
            sample(tiny_arguments, checkpoint, tmp_path / "x")
    overrides = [override]
    if override == "other code":
        monkeypatch.setattr(image_provenance, "code_facts", lambda: {"code": "0ther"})
        overrides = []
    if override == "other weights":
        state = load_state_dict(checkpoint)
        state["lm_head.bias"][0] += 1
        checkpoint, overrides = tmp_path / "other.safetensors", []
        save_weights(state, checkpoint)
    with pytest.raises(InputError, match=message):
        sample(tiny_arguments, checkpoint, tmp_path / "x", *overrides)


@pytest.mark.multiprocess
def test_two_processes_killed_and_continued_with_one_and_with_three(
    tiny_arguments: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    many = ["sampling.num_fid_samples=301", "sampling.per_gpu_batch_size=2"]
    wanted = sample(tiny_arguments, checkpoint, tmp_path / "wanted", *many).read_bytes()
    for processes in (1, 3):
        output = tmp_path / f"killed_{processes}"
        folder = output.with_name(output.name + ".chunks")
        command = [SCRIPT, *arguments_of(tiny_arguments, checkpoint, output, *many)]
        workers = [start_script(command, tmp_path / "worker", **address) for address in rank_environments(2)]
        while len(list(folder.glob("*.npy"))) < 10:
            assert all(worker.is_alive() for worker in workers)
            time.sleep(0.002)
        for worker in workers:
            worker.kill()
            worker.join()
        assert len(list(folder.glob("*.npy"))) < 151
        assert not list(tmp_path.glob(f"{output.name}.npz*"))
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SampleChunks, "remove", lambda chunk_files: None)  # to look at them
            if processes == 1:
                sample(tiny_arguments, checkpoint, output, *many)
                assert before.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}.items()
            else:
                assert run_script(command, tmp_path, processes=processes).returncode == 0
        assert output.with_name(output.name + ".npz").read_bytes() == wanted


def test_png_files(tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path) -> None:
    assert not list(npz.parent.glob("*.images"))
    sample(tiny_arguments, checkpoint, tmp_path / "x", "sampling.save_png=true")
    files = sorted((tmp_path / "x.images").iterdir())
    assert [path.name for path in files] == [f"{i:06d}.png" for i in range(37)]
    images = np.stack([np.asarray(Image.open(path)) for path in files])
    np.testing.assert_array_equal(images, np.load(npz)["arr_0"])


def test_bfloat16_is_another_precision(tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path) -> None:
    rounded = np.load(sample(tiny_arguments, checkpoint, tmp_path / "x", "sampling.mixed_precision=bf16"))["arr_0"]
    exact = np.load(npz)["arr_0"]
    assert rounded.shape == exact.shape
    assert not np.array_equal(rounded, exact)


def test_what_is_complete_is_not_made_again(
    tiny_arguments: list[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    few = ["sampling.num_fid_samples=8", "sampling.save_png=true"]
    npz = sample(tiny_arguments, checkpoint, tmp_path / "x", *few)
    before, asked = npz.stat().st_mtime_ns, interrupt_after(monkeypatch, 0)
    sample(tiny_arguments, checkpoint, tmp_path / "x", *few)
    assert (npz.stat().st_mtime_ns, asked) == (before, [])
    assert "x.npz: already made" in capsys.readouterr().out
    (tmp_path / "x.images/000003.png").rename(tmp_path / "3.png")
    with pytest.raises(InputError, match=r"x\.images: found 7 images, expected 8"):
        sample(tiny_arguments, checkpoint, tmp_path / "x", *few)
    (tmp_path / "3.png").rename(tmp_path / "x.images/000003.png")
    content = npz.read_bytes()
    npz.write_bytes(content[:-30] + bytes([content[-30] ^ 1]) + content[-29:])  # of the same size
    with pytest.raises(InputError, match=r"x\.npz: exists, but .*x\.npz: found sha256 .*, expected"):
        sample(tiny_arguments, checkpoint, tmp_path / "x", *few)
    npz.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npz: .*sampling\.num_fid_samples: found 8"):
        sample(tiny_arguments, checkpoint, tmp_path / "x", "sampling.num_fid_samples=3", "sampling.save_png=true")
    npz.unlink()
    with pytest.raises(InputError, match=r"x\.images: holds the images of another run"):
        sample(tiny_arguments, checkpoint, tmp_path / "x", "sampling.num_fid_samples=3", "sampling.save_png=true")
    assert len(list((tmp_path / "x.images").iterdir())) == 8


def test_a_config_of_the_same_name_is_not_replaced(tiny_arguments: list[str], checkpoint: Path, tmp_path: Path) -> None:
    own = tmp_path / "rear.yaml"
    own.write_text("# by hand\n")
    with pytest.raises(InputError, match=r"rear\.yaml: exists, and the samples' config would replace it"):
        sample(tiny_arguments, checkpoint, tmp_path / "rear", "sampling.num_fid_samples=3")
    assert own.read_text() == "# by hand\n"
    assert not (tmp_path / "rear.chunks").exists()


def test_a_kill_after_the_last_file_is_no_obstacle(
    tiny_arguments: list[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["sampling.num_fid_samples=8"]
    for moment, module in (
        ("write_record", "scripts.sample_imagenet_rear"),
        ("shutil.rmtree", "utils.files.chunk_files"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.{moment}", lambda *arguments, **more: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                sample(tiny_arguments, checkpoint, tmp_path / moment, *few)
        npz = sample(tiny_arguments, checkpoint, tmp_path / moment, *few)
        assert npz.with_suffix(".json").is_file()
        assert not (tmp_path / f"{moment}.chunks").exists()
