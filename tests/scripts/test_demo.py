"""What the page computes, against the scripts that do the same; uploads; the start. The page itself, in a browser, is
in test_demo_page.py."""

import os
import socket
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.rear import ReAR
from modeling.sampling.generate import CodeSampler
from modeling.sampling.image_inputs import image_inputs
from modeling.sampling.image_sampler import ImageSampler
from scripts import complete_images, demo, reconstruct
from scripts.demo_page.growth import growing_codes
from scripts.demo_page.model import FRAMES, DemoModel, Settings, class_choices
from scripts.demo_page.uploads import MAX_BYTES, read_upload
from tests.conftest import make_noise_images
from tests.processes import WAIT_S
from tests.script_config import script_config
from utils.config import load_config
from utils.errors import InputError, NonFiniteError
from utils.files.weights import save_weights
from utils.schema import Config

SETTINGS = Settings(guidance_scale=2.0, randomize_temperature=0.9, top_k=20, top_p=0.95)
GREY = complete_images.GREY


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Random weights of a model of any order, and twelve held-out images of two classes."""
    folder = tmp_path_factory.mktemp("demo")
    return [*tiny_arguments, *demo_arguments(load_config([*tiny_arguments, "experiment.output_dir=unused"]), folder)]


def demo_arguments(config: Config, folder: Path) -> list[str]:
    torch.manual_seed(0)
    model = ReAR(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_weights(model.state_dict(), folder / "model.safetensors")
    return [
        f"experiment.generator_checkpoint={folder / 'model.safetensors'}",
        f"dataset.params.eval_shards_path_or_url={make_noise_images(folder / 'images', 6, 20, 24)}",
        *("experiment.output_dir=unused", "model.generator.order=random"),
    ]


@pytest.fixture(scope="module")
def model(arguments: list[str]) -> DemoModel:
    return DemoModel(load_config(arguments), max_images=5)


def with_settings(config: Config, seed: int) -> Config:
    generator = replace(config.model.generator, **SETTINGS._asdict())
    return replace(
        config, model=replace(config.model, generator=generator), sampling=replace(config.sampling, seed=seed)
    )


@pytest.mark.parametrize("order", ["raster", "random"])
def test_samples_grow_into_those_of_the_sampler(arguments: list[str], order: str) -> None:
    model = DemoModel(load_config([*arguments, f"sampling.order={order}"]), max_images=5)
    *frames, last = model.sample(3, 2, 7, SETTINGS)
    wanted = ImageSampler(model.model, model.tokenizer, with_settings(model.config, 7), 2)([3, 3 + 5])
    np.testing.assert_array_equal(last, wanted)
    assert len(frames) == FRAMES
    for i, frame in enumerate(frames, 1):
        is_grey = (frame == GREY).reshape(2, 4, 4, 4, 4, 3).all(axis=(2, 4, 5)).reshape(2, 16)
        first = 16 * i // (FRAMES + 1)
        assert (is_grey.sum(axis=1) == 16 - first).all()
        assert is_grey[:, first:].all() == (order == "raster")


def test_the_same_again_is_prepared_once(model: DemoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    original = CodeSampler._prepare
    monkeypatch.setattr(CodeSampler, "_prepare", lambda *given: prepared.append(given[1]) or original(*given))
    stronger = SETTINGS._replace(guidance_scale=2.5)
    asked = [(0, 2, SETTINGS), (1, 4, SETTINGS), (3, 2, stronger), (0, 2, SETTINGS)]
    pictures = [list(model.sample(label, count, 0, settings))[-1] for label, count, settings in asked]
    assert prepared == [2, 4]
    np.testing.assert_array_equal(pictures[0], pictures[3])


@pytest.mark.parametrize("class_label", [None, 2])
def test_completions_are_those_of_the_script(
    model: DemoModel, arguments: list[str], tmp_path: Path, class_label: int | None
) -> None:
    more = [f"{key}={value}" for key, value in (("keep", "border:0.50"), ("num_images", 1), ("num_completions", 3))]
    generator = [f"model.generator.{name}={value}" for name, value in SETTINGS._asdict().items()]
    complete_images.main(
        script_config(
            complete_images,
            [
                *arguments,
                *generator,
                *(f"completion.{one}" for one in more),
                f"completion.class_label={'null' if class_label is None else class_label}",
                f"completion.inputs={model.config.dataset.params.eval_shards_path_or_url}",
                *("sampling.seed=9", f"experiment.output_dir={tmp_path}"),
            ],
        )
    )
    image, label = model.heldout_image(0)
    assert label == 0
    kept = model.kept_region("border", 0.5)
    *frames, last = model.complete(image, kept, class_label, 3, 9, SETTINGS)
    np.testing.assert_array_equal(image, np.load(tmp_path / "inputs.npz")["arr_0"][0])
    np.testing.assert_array_equal(last, np.load(tmp_path / "completions.npz")["arr_0"])
    assert 0 < len(frames) <= FRAMES
    hole = (model.without(image, kept) == GREY).all(axis=-1)
    assert hole.sum() == 8 * 8
    for frame in frames:  # what stays is there from the first one on
        assert not (frame == GREY).all(axis=-1)[:, ~hole].any()
        assert (frame == GREY).all(axis=-1)[:, hole].any()


def test_the_brush(model: DemoModel) -> None:
    brushed = np.zeros((100, 100), bool)
    brushed[26, 99] = True
    assert model.kept_around(brushed).logical_not().nonzero().tolist() == [[4 + 3]]
    for mask in (np.zeros((9, 9), bool), np.ones((9, 9), bool)):
        with pytest.raises(InputError, match=r"leaves (0|16) of 16 codes"):
            model.kept_around(mask)


def test_models_in_raster_order_keep_the_top(arguments: list[str]) -> None:
    model = DemoModel(load_config([*arguments, "model.generator.order=raster"]), max_images=5)
    assert model.completes == "top"
    assert model.kept_region("top", 0.25).tolist() == [True] * 4 + [False] * 12
    with pytest.raises(InputError, match="trained in raster order alone"):
        model.kept_region("left", 0.5)


def test_reconstructions_are_those_of_the_script(model: DemoModel, arguments: list[str], tmp_path: Path) -> None:
    reconstruct.main(load_config([*arguments, f"experiment.output_dir={tmp_path}", "sampling.num_fid_samples=1"]))
    image = np.load(tmp_path / "reference.npz")["arr_0"][0]
    decoded, figures = model.reconstruct(image)
    np.testing.assert_array_equal(decoded, np.load(tmp_path / "reconstructions.npz")["arr_0"][0])
    assert f'"psnr": {figures["psnr"]}' in (tmp_path / "reconstruct.json").read_text()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"count": 6}, "found 6 images, expected 1 to demo.max_images=5"),
        ({"count": None}, "found an empty field"),
        ({"seed": -1}, "sampling.seed=-1"),
        ({"settings": SETTINGS._replace(randomize_temperature=0)}, "model.generator.randomize_temperature=0"),
        ({"settings": SETTINGS._replace(guidance_scale=float("nan"))}, "model.generator.guidance_scale=nan"),
    ],
)
def test_what_is_out_of_range_is_named(model: DemoModel, asked: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        next(model.sample(**{"class_label": 0, "count": 1, "seed": 0, "settings": SETTINGS} | asked))


def test_held_out_images_that_are_not_there(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    model = DemoModel(load_config([*arguments, "dataset.params.eval_shards_path_or_url=absent-*.tar"]), max_images=5)
    assert "no held-out images on the page: absent-*.tar" in capsys.readouterr().out
    with pytest.raises(InputError, match="held-out image 0"):
        model.heldout_image(0)


def test_weights_that_compute_no_numbers_are_an_input_error(arguments: list[str]) -> None:
    model = DemoModel(load_config(arguments), max_images=5)
    with torch.no_grad():
        model.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        list(model.sample(0, 1, 0, SETTINGS))


def test_a_page_that_is_closed_ends_the_sampling(model: DemoModel) -> None:
    sampler, inputs, steps = (
        CodeSampler(model.model, model.config.model.generator),
        image_inputs([0], model.model, 0),
        [],
    )

    def sample(on_step: Callable[[], object]) -> torch.Tensor:
        def steps_that_stop_at_five() -> None:
            steps.append(on_step())
            deadline = time.monotonic() + WAIT_S
            while len(steps) == 5 and time.monotonic() < deadline:
                on_step()  # raises when the page is closed

        return sampler(*inputs, steps_that_stop_at_five)

    frames = growing_codes(sampler, sample, frames=3)
    codes, is_there = next(frames)
    assert (codes.shape, is_there.sum()) == ((1, 16), 4)
    frames.close()
    assert len(steps) in (4, 5)


def animated(path: Path, kind: str) -> None:
    first, *others = (Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue"))
    first.save(path, kind, save_all=True, append_images=others)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.png", "text.png: found no picture that can be read, expected PNG, JPEG"),
        ("start.eps", "found no picture that can be read"),
        ("cut.jpg", "found no picture that can be read"),
        ("moving.gif", "found 3 frames of 32 x 32 pixels, expected one of at most 50000000 pixels"),
        ("moving.webp", "found 3 frames"),
        ("wide.png", "found 1 frames of 8000 x 8000 pixels"),
        ("bomb.png", "could be decompression bomb"),
        ("large.bmp", f"found {MAX_BYTES + 1} bytes, expected at most {MAX_BYTES}"),
    ],
)
def test_bad_uploads(model: DemoModel, tmp_path: Path, name: str, message: str) -> None:
    path, small = tmp_path / name, Image.new("RGB", (32, 32), "red")
    if name.startswith("moving"):
        animated(path, name.partition(".")[2])
    elif path.suffix == ".eps":
        small.save(path)
    elif name in ("wide.png", "bomb.png"):
        side = 8000 if name == "wide.png" else 40_000
        small.save(path)
        written = path.read_bytes()
        size = side.to_bytes(4, "big")
        path.write_bytes(with_checksum(written, written[8:16] + size + size + written[24:29]))
    elif name == "cut.jpg":
        small.save(path)
        path.write_bytes(path.read_bytes()[:-300])
    elif name == "large.bmp":
        path.touch()
        os.truncate(path, MAX_BYTES + 1)
    else:
        path.write_text("no picture\n" * 99)
    with pytest.raises(InputError, match=message):
        read_upload(path, model.config.dataset.preprocessing)


def with_checksum(png: bytes, header: bytes) -> bytes:
    """The file with another first chunk."""
    return png[:8] + header + zlib.crc32(header[4:]).to_bytes(4, "big") + png[33:]


def test_an_upload_is_cropped_as_the_images_of_a_folder(model: DemoModel, tmp_path: Path) -> None:
    file = next(Path(model.config.dataset.params.eval_shards_path_or_url).glob("cat/0.png"))
    np.testing.assert_array_equal(read_upload(file, model.config.dataset.preprocessing), model.heldout_image(0)[0])


def test_names_of_classes(arguments: list[str], tmp_path: Path) -> None:
    assert class_choices(load_config(arguments)) == ["0", "1", "2", "3", "4"]
    make_noise_images(tmp_path, 1, 16, 16)
    named = load_config([*arguments, f"dataset.params.train_shards_path_or_url={tmp_path}"])
    assert class_choices(named) == ["0 cat", "1 dog", "2", "3", "4"]
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/classes.json").write_text('["a", "b", "c", "d", "e"]')
    exported = load_config([*arguments, f"experiment.generator_checkpoint={tmp_path / 'exported'}"])
    assert class_choices(exported) == ["0 a", "1 b", "2 c", "3 d", "4 e"]
    imagenet = class_choices(load_config(["config=configs/rear_b.yaml", "dataset.params.pretokenization=null"]))
    assert (len(imagenet), imagenet[207], imagenet[360]) == (1000, "207 golden retriever", "360 otter")


def test_an_address_that_is_taken_is_named(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: name)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"demo\.host=127\.0\.0\.1, demo\.port={port}: Address already in use"):
            demo.main(script_config(demo, [*arguments, f"demo.port={port}"]))


def test_without_gradio_one_line_says_what_to_install(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -r requirements-demo\.txt"):
        demo.main(script_config(demo, arguments))
