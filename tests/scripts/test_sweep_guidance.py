"""The sweep against the sampler and the metrics by hand; killed and resumed; refused inputs."""

import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.metrics import Gaussian, frechet_distance
from modeling.rear import ReAR
from scripts import sample_imagenet_rear, sweep_guidance
from tests.evaluation.made_up import StubExtractor, blocky_images
from tests.processes import run_ranks, run_script
from tests.script_config import script_config
from utils.config import load_config
from utils.errors import InputError
from utils.files.weights import save_weights
from utils.keys import ConfigError
from utils.randomness import Stream, permutation, philox

SCRIPT = "scripts/sweep_guidance.py"
SIX = ("sweep.guidance_scale=[4,1]", "sweep.guidance_scale_pow=[0]", "sweep.randomize_temperature=[1,0.5,2]")
FILES = ["best.txt", "sweep.json", "sweep.md", "sweep.png"]


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Random weights and a reference of 11 images."""
    folder = tmp_path_factory.mktemp("sweep")
    torch.manual_seed(0)
    model = ReAR(load_config([*tiny_arguments, "experiment.output_dir=unused"]).model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_weights(model.state_dict(), folder / "model.safetensors")
    np.savez(folder / "reference.npz", arr_0=blocky_images(np.random.RandomState(0), 11, 16))
    weights = f"experiment.generator_checkpoint={folder / 'model.safetensors'}"
    few = ("sampling.num_fid_samples=10", "sampling.per_gpu_batch_size=4")
    return [*tiny_arguments, weights, f"sweep.reference={folder / 'reference.npz'}", *few]


@pytest.fixture(scope="module", autouse=True)
def stub() -> Iterator[None]:
    """Features at next to no cost, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_guidance, "find_extractor", lambda device, needed_by: ("fid", StubExtractor()))
        yield


@pytest.fixture(scope="module")
def whole(arguments: list[str], stub: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over six settings without an interruption."""
    output_dir = tmp_path_factory.mktemp("whole") / "sweep"
    run(arguments, output_dir, *SIX)
    return output_dir


def run(arguments: list[str], output_dir: Path, *more: str) -> dict:
    sweep_guidance.main(script_config(sweep_guidance, [*arguments, f"experiment.output_dir={output_dir}", *more]))
    return json.loads((output_dir / "sweep.json").read_text())


def gaussian(images: np.ndarray) -> Gaussian:
    pool = StubExtractor()(torch.from_numpy(images)).pool.double().numpy()
    return Gaussian(mu=pool.mean(0), sigma=np.cov(pool, rowvar=False))


@pytest.mark.parametrize("classes", [[], ["sampling.class_labels=[3,1]", "sampling.images_per_class=3"]])
def test_the_scores_are_those_of_the_samplers_images(arguments: list[str], tmp_path: Path, classes: list[str]) -> None:
    found = run(arguments, tmp_path / "sweep", *SIX, *classes)
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == FILES
    reference = np.load(next(word for word in arguments if "reference" in word).partition("=")[2])["arr_0"]
    halves = np.array_split(permutation(philox(Stream.REFERENCE_HALVES, 0, 0), 11), 2)
    rows = {(row["guidance_scale"], row["randomize_temperature"]): row for row in found["settings"]}
    assert list(rows) == [(1, 0.5), (4, 0.5), (1, 1), (4, 1), (1, 2), (4, 2)]
    for number, setting in enumerate([(4, 0.5), (1, 2)]):
        overrides = [f"model.generator.guidance_scale={setting[0]}", "model.generator.guidance_scale_pow=0"]
        overrides += [
            f"model.generator.randomize_temperature={setting[1]}",
            f"experiment.output_dir={tmp_path}/{number}",
        ]
        sample_imagenet_rear.main(load_config([*arguments, *classes, *overrides]))
        images = np.load(tmp_path / f"{number}.npz")["arr_0"]
        for half, name in zip(halves, ("choosing_half", "other_half"), strict=True):
            expected = frechet_distance(gaussian(reference[half]), gaussian(images))
            assert rows[setting][name] == pytest.approx(expected, rel=1e-6)
        assert rows[setting]["inception_score"] > 1
    assert len({row["choosing_half"] for row in rows.values()}) == 6


def test_the_best_by_one_half_is_reported_with_its_score_on_the_other(arguments: list[str], whole: Path) -> None:
    found = json.loads((whole / "sweep.json").read_text())
    assert found["distance"] == "fid"
    best = min(found["settings"], key=lambda row: row["choosing_half"])
    line = (whole / "best.txt").read_text()
    assert line.rstrip() == found["best"]
    generator = load_config([*arguments, "experiment.output_dir=unused", *line.split()]).model.generator
    assert all(getattr(generator, key) == best[key] for key in sweep_guidance.KEYS)
    page = (whole / "sweep.md").read_text()
    assert page.count("\n| ") == 7
    assert f"best by the choosing half: {found['best']}\n" in page
    assert f"its FID to the other half of the reference, 10 samples each: {best['other_half']:.4g}\n" in page
    assert np.asarray(Image.open(whole / "sweep.png").convert("L")).std() > 10


def test_batch_size_changes_nothing(arguments: list[str], tmp_path: Path) -> None:
    one, other = (
        run(arguments, tmp_path / size, "sweep.guidance_scale=[2]", f"sampling.per_gpu_batch_size={size}")
        for size in ("3", "16")
    )
    for row, same in zip(one["settings"], other["settings"], strict=True):
        assert row == pytest.approx(same, rel=1e-5)


def test_a_killed_sweep_resumes_at_the_next_setting(
    arguments: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files, byte by byte."""
    sampled, original = [], sweep_guidance.ImageSampler

    def sampler(model: object, tokenizer: object, config: object, *more: object) -> object:
        sampled.append(config.model.generator.randomize_temperature)
        if len(sampled) == 3:
            raise OSError("the machine is gone")
        return original(model, tokenizer, config, *more)

    monkeypatch.setattr(sweep_guidance, "ImageSampler", sampler)
    with pytest.raises(OSError, match="the machine is gone"):
        run(arguments, tmp_path / "killed", *SIX)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["sweep.json"]
    run(arguments, tmp_path / "killed", *SIX)
    assert len(sampled) == 3 + 4
    run(arguments, tmp_path / "killed", *SIX)
    assert len(sampled) == 3 + 4
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (whole / name).read_bytes()


def sweep_on_rank(arguments: list[str], dies_at: int | None) -> None:
    """With the cheap features; killed when it starts the setting of this number."""
    numbers, original = itertools.count(), sweep_guidance.ImageSampler

    def sampler(*given: object) -> object:
        if next(numbers) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given)

    sweep_guidance.ImageSampler = sampler  # of this process alone
    sweep_guidance.find_extractor = lambda device, needed_by: ("fid", StubExtractor())
    sweep_guidance.main(script_config(sweep_guidance, arguments))


@pytest.mark.multiprocess
def test_two_processes_killed_and_continued(arguments: list[str], whole: Path, tmp_path: Path) -> None:
    alone = json.loads((whole / "sweep.json").read_text())["settings"]
    output = tmp_path / "killed"
    command = [*arguments, *SIX, f"experiment.output_dir={output}"]
    with pytest.raises(AssertionError):
        run_ranks(sweep_on_rank, command, 2, processes=2)
    before = json.loads((output / "sweep.json").read_text())["settings"]
    assert len(before) == 2
    run_ranks(sweep_on_rank, command, None, processes=2)
    after = json.loads((output / "sweep.json").read_text())["settings"]
    assert all(row in after for row in before)
    assert [pytest.approx(row, rel=1e-9) for row in alone] == after
    assert (output / "sweep.md").read_text() == (whole / "sweep.md").read_text()


def test_more_values_add_to_the_table(arguments: list[str], tmp_path: Path) -> None:
    first = run(arguments, tmp_path / "x", "sweep.guidance_scale=[4,4.0]")
    both = run(arguments, tmp_path / "x", "sweep.guidance_scale=[2]")
    assert [row["guidance_scale"] for row in both["settings"]] == [2, 4]
    assert both["settings"][1:] == first["settings"]
    assert both["settings"][0]["guidance_scale_pow"] == 2.25


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["sweep.reference=null"], r"sweep\.reference: missing"),
        (["sweep.reference=absent.npz"], r"absent\.npz: no such file"),
        (["sweep.reference={folder}/large.npz"], r"large\.npz: found images of 32x32 pixels, expected 16x16"),
        (["experiment.generator_checkpoint=null"], r"experiment\.generator_checkpoint: missing"),
        (["sampling.num_fid_samples=1"], r"sampling\.num_fid_samples: found 1 image to sample, expected at least 2"),
        (["sampling.class_labels=[7]"], r"sampling\.class_labels: found '7', expected 0 to 4 or"),
        (["sweep.guidance_scale=[]"], r"sweep\.guidance_scale=\[\]: expected non-empty list"),
        (["sweep.guidance_scale_pow=[1,-1]"], r"sweep\.guidance_scale_pow=\[1, -1\]: expected .*>= 0"),
        (["sweep.randomize_temperature=1"], r"sweep\.randomize_temperature=1: expected .*list of float"),
    ],
)
def test_errors_in_one_line(arguments: list[str], tmp_path: Path, more: list[str], message: str) -> None:
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises((InputError, ConfigError), match=message):
        run(arguments, tmp_path / "x", *(word.format(folder=tmp_path) for word in more))
    assert not (tmp_path / "x").exists()


def test_scores_of_another_origin_are_not_mixed(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("sweep.guidance_scale=[1]", "sampling.num_fid_samples=4")
    run(arguments, tmp_path / "x", *few)
    with pytest.raises(InputError, match=r"sweep\.json: .*sampling\.seed: found 42, expected 1;"):
        run(arguments, tmp_path / "x", *few, "sampling.seed=1")
    np.savez(tmp_path / "other.npz", arr_0=blocky_images(np.random.RandomState(1), 11, 16))
    with pytest.raises(InputError, match=r"sweep\.json: .*sha256 of sweep\.reference: found"):
        run(arguments, tmp_path / "x", *few, f"sweep.reference={tmp_path / 'other.npz'}")


def test_scores_of_other_features_are_not_mixed(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("sweep.guidance_scale=[1]", "sampling.num_fid_samples=4")
    run(arguments, tmp_path / "x", *few)
    monkeypatch.setattr(StubExtractor, "weights_sha256", "others")
    with pytest.raises(InputError, match=r"sha256 of the feature weights: found none, expected others;"):
        run(arguments, tmp_path / "x", *few)


def test_the_choosing_half_chooses() -> None:
    settings = [sweep_guidance.Setting(scale, 0.0, 1.0) for scale in (1.0, 2.0, 3.0)]
    distances = ((5.0, 1.0), (3.0, 9.0), (4.0, 2.0))
    scores = {
        setting: {"choosing_half": choosing, "other_half": other}
        for setting, (choosing, other) in zip(settings, distances, strict=True)
    }
    assert sweep_guidance.best_of(scores) == settings[1]


def test_values_that_are_not_finite_name_the_setting(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sweep_guidance.load_generator

    def damaged(*given: object) -> ReAR:
        model = original(*given)
        model.lm_head.bias.data[1] = torch.nan
        return model

    monkeypatch.setattr(sweep_guidance, "load_generator", damaged)
    with pytest.raises(InputError, match=r"^model\.generator\.guidance_scale=1\.0 .*not finite.*generator_checkpoint="):
        run(arguments, tmp_path / "x")


@pytest.mark.multiprocess
def test_the_script_says_what_is_wrong(arguments: list[str], tmp_path: Path) -> None:
    command = [SCRIPT, *arguments, "sampling.class_labels=[7]", f"experiment.output_dir={tmp_path / 'x'}"]
    done = run_script(command, tmp_path, processes=2)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: sampling.class_labels: found '7'")
