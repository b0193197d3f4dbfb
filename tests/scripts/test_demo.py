"""What the demo computes, against the scripts that do the same; uploads. The page in a browser: test_demo_page.py."""

import os
import zlib
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.rear import ReAR
from modeling.sampling.image_sampler import ImageSampler
from scripts import complete_images, demo, reconstruct
from scripts.demo_model import MAX_BYTES, DemoModel, Settings, names_of_classes, read_upload
from tests.conftest import make_noise_images
from tests.script_config import script_config
from utils.config import load_config
from utils.errors import InputError, NonFiniteError
from utils.files.weights import save_weights
from utils.schema import Config

SETTINGS = Settings(guidance_scale=2.0, randomize_temperature=0.9, top_k=20, top_p=0.95)


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("demo")
    return [*tiny_arguments, *demo_arguments(load_config([*tiny_arguments, "experiment.output_dir=unused"]), folder)]


def demo_arguments(config: Config, folder: Path) -> list[str]:
    """Random weights of a model of any order, and twelve validation images of two classes."""
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
    return DemoModel(load_config(arguments))


def validation_image(model: DemoModel, index: int = 0) -> np.ndarray:
    return model.validation[index]["image"].numpy()


@pytest.mark.parametrize("order", ["raster", "random"])
def test_samples_are_those_of_the_sampler(arguments: list[str], order: str) -> None:
    model = DemoModel(load_config([*arguments, f"sampling.order={order}"]))
    generator = replace(model.config.model.generator, **SETTINGS._asdict())
    sampling = replace(model.config.sampling, seed=7)
    config = replace(model.config, model=replace(model.config.model, generator=generator), sampling=sampling)
    expected = ImageSampler(model.model, model.tokenizer, config, 2)([3, 3 + 5])
    np.testing.assert_array_equal(model.sample(3, 2, 7, SETTINGS), expected)
    model.sample(3, 2, 8, SETTINGS._replace(guidance_scale=3.0))
    np.testing.assert_array_equal(model.sample(3, 2, 7, SETTINGS), expected)


@pytest.mark.parametrize("class_label", [None, 2])
def test_completions_are_those_of_the_script(
    model: DemoModel, arguments: list[str], tmp_path: Path, class_label: int | None
) -> None:
    completion = {
        "keep": "border:0.5",
        "num_images": 1,
        "num_completions": 3,
        "class_label": "null" if class_label is None else class_label,
        "inputs": model.config.dataset.params.eval_shards_path_or_url,
    }
    complete_images.main(
        script_config(
            complete_images,
            [
                *arguments,
                *(f"model.generator.{name}={value}" for name, value in SETTINGS._asdict().items()),
                *(f"completion.{name}={value}" for name, value in completion.items()),
                *("sampling.seed=9", f"experiment.output_dir={tmp_path}"),
            ],
        )
    )
    image = validation_image(model)
    np.testing.assert_array_equal(image, np.load(tmp_path / "inputs.npz")["arr_0"][0])
    kept = model.kept_region("border")
    images = model.complete(image, kept, class_label, 3, 9, SETTINGS)
    np.testing.assert_array_equal(images, np.load(tmp_path / "completions.npz")["arr_0"])
    hidden = (model.hide(image, kept) == complete_images.GREY).all(axis=-1)
    assert hidden[4:12, 4:12].all()
    assert hidden.sum() == 8 * 8


def test_the_brush(model: DemoModel) -> None:
    brushed = np.zeros((100, 100), bool)
    brushed[26, 99] = True
    assert model.kept_around(brushed).logical_not().nonzero().tolist() == [[4 + 3]]
    for mask in (np.zeros((9, 9), bool), np.ones((9, 9), bool)):
        with pytest.raises(InputError, match=r"leaves (0|16) of 16 codes"):
            model.kept_around(mask)


def test_models_in_raster_order_keep_the_top(arguments: list[str]) -> None:
    model = DemoModel(load_config([*arguments, "model.generator.order=raster"]))
    assert not model.any_order
    assert model.kept_region("top").tolist() == [True] * 8 + [False] * 8
    with pytest.raises(InputError, match=r"completion\.keep=left:0\.5"):
        model.kept_region("left")


def test_reconstructions_are_those_of_the_script(model: DemoModel, arguments: list[str], tmp_path: Path) -> None:
    reconstruct.main(load_config([*arguments, f"experiment.output_dir={tmp_path}", "sampling.num_fid_samples=1"]))
    image = np.load(tmp_path / "reference.npz")["arr_0"][0]
    decoded, psnr = model.reconstruct(image)
    np.testing.assert_array_equal(decoded, np.load(tmp_path / "reconstructions.npz")["arr_0"][0])
    assert f'"psnr": {psnr}' in (tmp_path / "reconstruct.json").read_text()


@pytest.mark.parametrize("settings", [{"randomize_temperature": 0}, {"guidance_scale": float("nan")}])
def test_settings_out_of_range_are_named(model: DemoModel, settings: dict) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        model.sample(0, 1, 0, SETTINGS._replace(**settings))


def test_the_page_does_without_validation_images(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    model = DemoModel(load_config([*arguments, "dataset.params.eval_shards_path_or_url=absent-*.tar"]))
    assert model.validation is None
    assert "absent-*.tar" in capsys.readouterr().out


def test_weights_that_compute_no_numbers_are_an_input_error(arguments: list[str]) -> None:
    model = DemoModel(load_config(arguments))
    with torch.no_grad():
        model.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        model.sample(0, 1, 0, SETTINGS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.png", "no picture that can be read"),
        ("start.eps", "no picture that can be read"),
        ("cut.jpg", "no picture that can be read"),
        ("wide.png", "too many pixels"),
        ("bomb.png", "no picture that can be read"),
        ("strip.png", "found 1 x 250000 pixels, expected at most 100 times"),
        ("large.bmp", f"found {MAX_BYTES + 1} bytes"),
    ],
)
def test_bad_uploads(model: DemoModel, tmp_path: Path, name: str, message: str) -> None:
    path, small = tmp_path / name, Image.new("RGB", (32, 32), "red")
    if path.suffix == ".eps":
        small.save(path)
    elif name in ("wide.png", "bomb.png"):
        small.save(path)
        change_size(path, side=8000 if name == "wide.png" else 40_000)
    elif name == "strip.png":
        Image.new("1", (1, 250_000)).save(path)
    elif name == "cut.jpg":
        small.save(path)
        path.write_bytes(path.read_bytes()[:-300])
    elif name == "large.bmp":
        path.touch()
        os.truncate(path, MAX_BYTES + 1)
    else:
        path.write_text("no picture\n" * 99)
    with pytest.raises(InputError, match=f"{name}: .*{message}"):
        read_upload(path, model.config.dataset.preprocessing)


def change_size(png: Path, side: int) -> None:
    """Another size in the header, with its checksum; the pixels stay."""
    written = png.read_bytes()
    size = side.to_bytes(4, "big")
    header = written[8:16] + size + size + written[24:29]
    png.write_bytes(written[:8] + header + zlib.crc32(header[4:]).to_bytes(4, "big") + written[33:])


def test_uploads_are_cropped_like_images_of_a_folder(model: DemoModel, tmp_path: Path) -> None:
    file = Path(model.config.dataset.params.eval_shards_path_or_url, "cat/0.png")
    preprocessing = model.config.dataset.preprocessing
    np.testing.assert_array_equal(read_upload(file, preprocessing), validation_image(model))
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "green")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (read_upload(tmp_path / "moving.gif", preprocessing) == (255, 0, 0)).all()


def test_names_of_classes(arguments: list[str], tmp_path: Path) -> None:
    assert names_of_classes(load_config(arguments), None) == ["0", "1", "2", "3", "4"]
    make_noise_images(tmp_path, 1, 16, 16)
    named = load_config([*arguments, f"dataset.params.train_shards_path_or_url={tmp_path}"])
    assert names_of_classes(named, None) == ["0 cat", "1 dog", "2", "3", "4"]
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/classes.json").write_text('["a", "b", "c", "d", "e"]')
    exported = load_config([*arguments, f"experiment.generator_checkpoint={tmp_path / 'exported'}"])
    assert names_of_classes(exported, None) == ["0 a", "1 b", "2 c", "3 d", "4 e"]
    assert names_of_classes(exported, ["v", "w"]) == ["0 v", "1 w", "2", "3", "4"]
    imagenet_config = load_config(["config=configs/rear_b.yaml", "dataset.params.pretokenization=null"])
    imagenet = names_of_classes(imagenet_config, None)
    assert (len(imagenet), imagenet[207], imagenet[360]) == (1000, "207 golden retriever", "360 otter")


def test_clicks_are_processed_one_at_a_time(model: DemoModel) -> None:
    pytest.importorskip("gradio")
    page = import_module("scripts.demo_page").build_page(model, max_images=4)
    assert {(click.concurrency_id, click.concurrency_limit) for click in page.fns.values()} == {("model", 1)}


def test_without_gradio_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -r requirements-demo\.txt"):
        demo.main(script_config(demo, ["experiment.output_dir=unused"]))
