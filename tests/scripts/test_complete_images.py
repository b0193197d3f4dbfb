"""Completions against the tokenizer and the sampler by hand; what stays, and what is refused."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.loading import load_generator, load_tokenizer
from modeling.rear import ReAR
from modeling.sampling.generate import generate
from modeling.sampling.inpainting import region_mask
from scripts import complete_images
from tests.processes import run_script
from tests.script_config import script_config
from tests.scripts.test_demo import change_size
from utils.config import load_config
from utils.errors import InputError
from utils.files.weights import load_state_dict, save_weights
from utils.images import to_float
from utils.randomness import image_uniforms

ANY_ORDER = "model.generator.order=random"


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Random weights, and five noise images in a folder without classes."""
    folder = tmp_path_factory.mktemp("completion")
    torch.manual_seed(0)
    model = ReAR(load_config([*tiny_arguments, "experiment.output_dir=unused"]).model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_weights(model.state_dict(), folder / "model.safetensors")
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"images/{i}.png")
    (folder / "images/notes.txt").write_text("no image")
    paths = [
        f"experiment.generator_checkpoint={folder / 'model.safetensors'}",
        f"completion.inputs={folder / 'images'}",
    ]
    return [*tiny_arguments, *paths, "completion.num_completions=2"]


def run(arguments: list[str], output_dir: Path, *more: str) -> dict[str, np.ndarray]:
    complete_images.main(script_config(complete_images, [*arguments, f"experiment.output_dir={output_dir}", *more]))
    with np.load(output_dir / "completions.npz") as file, np.load(output_dir / "inputs.npz") as inputs:
        return {"inputs": inputs["arr_0"], "images": file["arr_0"], "which": file["arr_1"], "kept": file["kept"]}


@pytest.mark.parametrize("batch_size", [3, 8])
@pytest.mark.parametrize("label", [None, 3])
def test_files(arguments: list[str], tmp_path: Path, batch_size: int, label: int | None) -> None:
    more = [f"completion.class_label={'null' if label is None else label}", f"sampling.per_gpu_batch_size={batch_size}"]
    arrays = run(arguments, tmp_path / "out", *more)
    config = script_config(complete_images, [*arguments, "experiment.output_dir=unused", *more])
    assert arrays["kept"].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    assert arrays["which"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert arrays["inputs"].shape == (5, 16, 16, 3)

    tokenizer = load_tokenizer(config)
    model = load_generator(Path(config.experiment.generator_checkpoint), config.model).eval()
    codes = tokenizer.encode(to_float(torch.from_numpy(arrays["inputs"])))
    mask = torch.from_numpy(arrays["kept"]).flatten().expand(5, -1)
    labels = torch.full((5,), model.null_class if label is None else label)
    for k in range(2):
        uniforms = image_uniforms(42 + k, list(range(5)), 16)
        completed = generate(model, labels, uniforms, config.model.generator, None, codes, mask)
        wanted = (tokenizer.decode(completed) * 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)
        assert np.abs(arrays["images"][k::2].astype(int) - wanted).max() <= 1
    assert (arrays["images"][::2] != arrays["images"][1::2]).any()

    figures = json.loads((tmp_path / "out/completions.json").read_text())
    assert figures["kept_codes"] == "8 of 16"
    decoded = (tokenizer.decode(codes) * 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    of_tokenizer = np.square((decoded.astype(float) - arrays["inputs"])[:, 8:] / 255).mean(axis=(1, 2, 3))
    assert figures["psnr_of_the_tokenizer"] == pytest.approx((-10 * np.log10(of_tokenizer)).mean(), abs=1e-3)
    error = (arrays["images"].astype(float) - arrays["inputs"].repeat(2, axis=0))[:, 8:] / 255
    assert figures["psnr"] == pytest.approx((-10 * np.log10(np.square(error).mean(axis=(1, 2, 3)))).mean(), rel=1e-5)
    assert Image.open(tmp_path / "out/completions.png").size == (4 * 18 - 2, 5 * 18 - 2)


@pytest.mark.parametrize("keep", ["left:0.5", "center:0.5", "border:0.5", "picture"])
@pytest.mark.parametrize("order", ["raster", "random"])
def test_any_region_can_be_kept_with_models_of_any_order(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str, order: str
) -> None:
    seen = []
    original = complete_images.inpaint

    def inpaint(codes: torch.Tensor, *given: object, **more: object) -> torch.Tensor:
        seen.append((codes, original(codes, *given, **more)))
        return seen[0][1]

    monkeypatch.setattr(complete_images, "inpaint", inpaint)
    if keep == "picture":
        Image.fromarray(np.kron(np.eye(4), np.full((9, 9), 255)).astype(np.uint8)).save(tmp_path / "mask.png")
        keep = str(tmp_path / "mask.png")
    arrays = run(arguments, tmp_path / "out", f"completion.keep={keep}", ANY_ORDER, f"sampling.order={order}")
    codes, completed = seen[0]
    kept = torch.from_numpy(arrays["kept"]).flatten()
    assert 0 < kept.sum() < 16
    assert torch.equal(completed[:, :, kept], codes[:, None, kept].expand(-1, 2, -1))
    assert not torch.equal(completed[:, 0], completed[:, 1])
    assert arrays["images"].shape == (10, 16, 16, 3)


def test_annealed_models_are_distinguished(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    warned = []
    for keep in ("top:0.5", "border:0.5"):
        run(arguments, tmp_path / keep, f"completion.keep={keep}", "model.generator.order=annealed")
        warned.append("weights support raster order only" in capsys.readouterr().out)
    assert warned == [False, True]


def test_the_regions() -> None:
    def text(name: str, share: float) -> list[str]:
        return ["".join(".#"[kept] for kept in row) for row in region_mask(name, share, 4, 4).astype(int)]

    assert text("top", 0.25) == ["####", "....", "....", "...."]
    assert text("left", 0.5) == ["##..", "##..", "##..", "##.."]
    assert text("center", 0.5) == ["....", ".##.", ".##.", "...."]
    assert text("border", 0.5) == ["####", "#..#", "#..#", "####"]
    assert region_mask("center", 0.25, 16, 16).sum() == region_mask("border", 0.75, 16, 16).size - 16 * 15 == 16


def test_completions_do_not_depend_on_how_many_there_are(arguments: list[str], tmp_path: Path) -> None:
    few, many = (
        run(arguments, tmp_path / str(count), f"completion.num_completions={count}", "completion.num_images=3")
        for count in (1, 3)
    )
    np.testing.assert_array_equal(few["images"], many["images"][::3])


def test_shards_and_folders_with_classes_are_inputs_too(arguments: list[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / name / "0.png")
    assert len(run(arguments, tmp_path / "out", f"completion.inputs={tmp_path / 'images'}")["inputs"]) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["completion.inputs=null"], "completion.inputs: missing"),
        (["experiment.generator_checkpoint=null"], "experiment.generator_checkpoint: missing"),
        (
            ["completion.keep=left:0.5"],
            r"completion.keep=left:0.5: expected top:SHARE, as model.generator.order=raster",
        ),
        (["completion.keep=bottom"], r"completion.keep=bottom: expected top:SHARE, left:SHARE"),
        (["completion.keep=top:0.1"], r"completion.keep=top:0.1: keeps 0 of 16 tokens, expected some, not all"),
        (["completion.keep=center:.99", ANY_ORDER], "keeps 16 of 16 tokens"),
        (["completion.keep=README.md"], "completion.keep=README.md: found no picture that can be read"),
        (["completion.keep=docs/results/quickstart/training_curves.png"], r"pixels, expected a square"),
        (["completion.class_label=5"], "completion.class_label=5: expected 0 to 4, or null for the null class"),
        (["completion.inputs=scripts_bash"], "scripts_bash: found no image"),
    ],
)
def test_what_is_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(InputError, match=message):
        run(arguments, tmp_path / "out", *more)
    assert not (tmp_path / "out/completions.npz").exists()


def test_other_completions_are_not_replaced(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run(arguments, tmp_path / "out")
    run(arguments, tmp_path / "out", "sampling.per_gpu_batch_size=3")
    assert "completions.npz: already made" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"completions.npz: .*sampling.seed: found 42, expected 1;"):
        run(arguments, tmp_path / "out", "sampling.seed=1")
    np.testing.assert_array_equal(run(arguments, tmp_path / "out")["images"], before["images"])


def test_the_provenance_has_all_that_the_completions_depend_on(arguments: list[str], tmp_path: Path) -> None:
    run(arguments, tmp_path / "out")
    for key, other in (
        ("model.generator.guidance_scale", "3"),
        ("model.generator.guidance_scale_pow", "1"),
        ("model.generator.randomize_temperature", "0.7"),
        ("model.generator.top_k", "3"),
        ("model.generator.top_p", "0.7"),
        ("sampling.uint8_rule", "round"),
        ("completion.num_completions", "1"),
        ("completion.class_label", "2"),
    ):
        with pytest.raises(InputError, match=rf"completions\.npz: exists with another provenance: {key}: found "):
            run(arguments, tmp_path / "out", f"{key}={other}")


def test_a_kill_before_the_record_is_no_obstacle(arguments: list[str], tmp_path: Path) -> None:
    command = ["scripts/complete_images.py", *arguments, f"experiment.output_dir={tmp_path / 'out'}"]
    assert run_script(command, tmp_path, REAR_FAULT="record").returncode == -signal.SIGKILL
    assert (tmp_path / "out/completions.npz").is_file()
    with pytest.raises(InputError, match=r"completions\.npz: .*sampling\.seed: found 42, expected 1;"):
        run(arguments, tmp_path / "out", "sampling.seed=1")
    run(arguments, tmp_path / "out")
    files = json.loads((tmp_path / "out/completions.json").read_text())["files"]
    assert sorted(files) == ["completions.npz", "completions.png", "inputs.npz"]
    (tmp_path / "out/inputs.npz").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"completions\.npz: exists, but .*inputs\.npz: found 3 bytes, expected "):
        run(arguments, tmp_path / "out")


def test_a_mask_is_that_of_the_order_of_the_training(arguments: list[str], tmp_path: Path) -> None:
    """Not of a config that was written later: a raster model cannot complete any region."""
    config = load_config([*arguments[:2], "experiment.output_dir=unused"])
    state = load_state_dict(Path(str(config.experiment.generator_checkpoint)))
    record = {"step": 3, "config": {"model.generator.order": "raster"}}
    save_weights(state, tmp_path / "x.safetensors", record)
    weights = f"experiment.generator_checkpoint={tmp_path / 'x.safetensors'}"
    with pytest.raises(InputError, match=r"completion\.keep=left:0\.5: expected top:SHARE, as .*order=raster"):
        run(arguments, tmp_path / "out", weights, "completion.keep=left:0.5", ANY_ORDER)


def test_a_mask_of_too_many_pixels(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.new("L", (4, 4)).save(path)
    change_size(path, side=40_000)
    with pytest.raises(InputError, match=r"mask\.png: found no picture that can be read \(DecompressionBombError\)"):
        complete_images.read_mask(path, 4, 4)
