"""The keys in a script's READS are those that it reads: every script runs with a recording config."""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling.rear import ReAR
from scripts.demo_model import DemoModel, Settings, read_upload
from tests.evaluation.made_up import StubExtractor
from tests.script_config import script_config, type_of_config
from utils.config import load_config
from utils.files.weights import save_weights
from utils.keys import keys_of, select
from utils.schema import Config

SCRIPTS = [
    import_module(f"scripts.{path.stem}")
    for path in sorted(Path(__file__).parents[2].glob("scripts/*.py"))
    if "\nREADS = " in path.read_text()
]
PROJECT = ("scripts", "modeling", "data", "evaluation", "utils")  # not dataclasses.asdict, which reads everything
UNREAD = {
    "model.vq_model.model_type",  # train_tokenizer.py trains one kind only
    "model.vq_model.num_latent_tokens",  # others follow it
    *(f"experiment.{name}" for name in ("project", "name", "entity", "group", "tags")),  # with wandb
    "training.allow_batch_change",  # with another batch
    "optimizer.params.momentum",  # with Muon
    "dataset.params.max_bad_fraction",  # with on_bad_sample=skip
    "training.max_nonfinite_steps",  # after a step that is not finite
    "experiment.allow_other_tokenizer",  # with another tokenizer
}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The keys that the project's code reads from a config."""
    keys = {name: key for script in SCRIPTS for name, key in keys_of(type_of_config(script)).items()}
    names = {(key.section, name.rsplit(".", 1)[-1]): name for name, key in keys.items()}
    found = set()

    def read(section: object, name: str) -> object:
        module = sys._getframe(1).f_globals["__name__"]
        if (type(section), name) in names and module.split(".")[0] in PROJECT:
            found.add(names[type(section), name])
        return object.__getattribute__(section, name)

    for section in {key.section for key in keys.values()}:
        monkeypatch.setattr(section, "__getattribute__", read)
    return found


@pytest.fixture
def arguments(tiny_arguments: list[str], tmp_path: Path) -> list[str]:
    """The tiny project with images of two classes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return [
        *tiny_arguments,
        f"experiment.output_dir={tmp_path / 'out'}",
        *("training.max_train_steps=2", "experiment.generate_every=1", "sampling.num_fid_samples=8"),
        *("experiment.eval_every=1", "experiment.eval_samples=2"),
        *(f"dataset.params.{split}_shards_path_or_url={tmp_path / 'images'}" for split in ("train", "eval")),
    ]


def check(name: str, recorded: set[str], unread: set[str] = UNREAD) -> None:
    script = import_module(f"scripts.{name}")
    keys = keys_of(type_of_config(script))
    said = {key.name for key in select(keys, script.READS)}
    assert recorded - said == set(), "read, but not in READS"
    assert said - recorded - unread == set(), "in READS, but not read"


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("train_tokenizer", "training.use_ema=true"),
        ("pretokenize", "dataset.params.pretokenization={folder}/codes.tokens"),
        ("inspect_codes", "dataset.params.on_bad_sample=skip"),
        ("reconstruct", "sampling.seed=1"),
    ],
)
def test_reads(script: str, more: str, arguments: list[str], recorded: set[str], tmp_path: Path) -> None:
    module = import_module(f"scripts.{script}")
    config = script_config(module, [*arguments, more.format(folder=tmp_path)])
    recorded.clear()  # of what the checks read
    module.main(config)
    if script == "reconstruct":  # it always crops in the centre and never flips
        recorded -= {"dataset.preprocessing.random_crop", "dataset.preprocessing.random_flip"}
    check(script, recorded)


def test_training_and_sampling_read(
    arguments: list[str], recorded: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, sample = import_module("scripts.train_rear"), import_module("scripts.sample_imagenet_rear")
    images = ["dataset.params.pretokenization=null", f"experiment.output_dir={tmp_path / 'on_images'}"]
    complete = import_module("scripts.complete_images")
    weights = [f"experiment.generator_checkpoint={tmp_path / 'out'}", f"experiment.output_dir={tmp_path / 'samples'}"]
    weights += ["sampling.class_labels=[cat]"]
    kinds = (
        ["dataset.params.on_bad_sample=skip"],
        [*images, "training.use_ema=true", "model.generator.order=annealed"],
        weights,
    )
    on_codes, on_images, sampling = (load_config([*arguments, *more]) for more in kinds)
    recorded.clear()  # of what the checks read
    train.main(on_codes)
    train.main(on_images)
    check("train_rear", recorded)
    of_training = {name for name in recorded if name.startswith("model.generator.")}
    recorded.clear()
    sample.main(sampling)
    check("sample_imagenet_rear", recorded, UNREAD | of_training)  # which enter the fingerprint of the samples
    completing = script_config(complete, [*arguments, *weights, f"completion.inputs={tmp_path / 'images'}"])
    recorded.clear()
    complete.main(completing)
    recorded -= {"dataset.preprocessing.random_crop", "dataset.preprocessing.random_flip"}  # as in reconstruct
    check("complete_images", recorded, UNREAD | of_training)
    np.savez(tmp_path / "reference.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    more = [f"sweep.reference={tmp_path / 'reference.npz'}", f"experiment.output_dir={tmp_path / 'sweep'}"]
    sweep = import_module("scripts.sweep_guidance")
    sweeping = script_config(sweep, [*arguments, *weights, *more])
    recorded.clear()
    monkeypatch.setattr(sweep, "find_extractor", lambda device, needed_by: ("fid", StubExtractor()))
    sweep.main(sweeping)
    check("sweep_guidance", recorded, UNREAD | of_training)


def test_the_demo_reads(arguments: list[str], recorded: set[str], tmp_path: Path) -> None:
    """A visitor instead of the page."""
    pytest.importorskip("gradio")
    config = load_config([*arguments, f"experiment.generator_checkpoint={tmp_path / 'model.safetensors'}"])
    save_weights(ReAR(config.model).state_dict(), tmp_path / "model.safetensors")
    demo_page = import_module("scripts.demo_page")
    recorded.clear()
    model, settings = DemoModel(config), Settings(1.0, 1.0, 0, 1.0)
    demo_page.build_page(model, max_images=4)
    image = read_upload(tmp_path / "images/cat/0.png", config.dataset.preprocessing)
    model.sample(0, 1, 0, settings)
    model.complete(image, model.kept_region("top"), None, 1, 0, settings)
    model.reconstruct(image)
    recorded -= {"dataset.preprocessing.random_crop", "dataset.preprocessing.random_flip"}  # as in reconstruct
    recorded.discard("sampling.per_gpu_batch_size")  # set by the page
    of_training = {key.name for key in select(keys_of(Config), {"model": "all"})} - recorded
    read_by_main = {"demo.host", "demo.port", "demo.max_images", "training.enable_tf32"}
    check("demo", recorded, UNREAD | of_training | read_by_main)
