"""Codes and a codebook without images: training and sampling as with the whole tokenizer, and one line elsewhere."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from data.codes.token_store import TokenStore
from evaluation.inputs import open_input
from modeling.loading import load_tokenizer
from modeling.sampling.image_sampler import PassThroughDecoder
from modeling.tokenizers.codes_only import CodesOnly
from scripts import (
    complete_images,
    convert_tokens,
    inspect_codes,
    pretokenize,
    reconstruct,
    sample_imagenet_rear,
    sweep_guidance,
    train_rear,
)
from scripts.demo_model import DemoModel
from tests.conftest import make_noise_images
from tests.docs.pages import fences
from tests.docs.test_commands import split
from tests.processes import ROOT, run_script
from tests.script_config import script_config
from utils.config import load_config
from utils.errors import InputError
from utils.files.sample_chunks import SampleChunks
from utils.files.weights import read_record
from utils.images import to_uint8
from utils.run.metrics_file import read_metrics

TRAINING = ("training.max_train_steps=3", "experiment.generate_every=2", "experiment.eval_every=3")


@pytest.fixture(scope="module")
def tokenizer_arguments(tiny_config_file: Path) -> list[str]:
    """The tiny project with its whole tokenizer."""
    held_out = f"dataset.params.eval_pretokenization={tiny_config_file.parent / 'codes.jsonl'}"
    return [f"config={tiny_config_file}", held_out]


@pytest.fixture(scope="module")
def arguments(tokenizer_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same with the codebook alone, in a file of NumPy's."""
    whole = load_tokenizer(load_config([*tokenizer_arguments, "experiment.output_dir=unused"]))
    path = tmp_path_factory.mktemp("codebook") / "codebook.npy"
    np.save(path, whole.codebook_lookup(torch.arange(24)[None])[0].numpy())
    return [
        *tokenizer_arguments,
        "model.vq_model.model_type=codes_only",
        f"experiment.tokenizer_checkpoint={path}",
    ]


@pytest.fixture(scope="module")
def run(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_rear.main(load_config([*arguments, *TRAINING, f"experiment.output_dir={folder}"]))
    return folder


@pytest.fixture(scope="module")
def sampled(arguments: list[str], run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sampled") / "x"
    sample_imagenet_rear.main(load_config(sampling_of(arguments, run, output)))
    return output.with_name("x.tokens")


def sampling_of(arguments: list[str], run: Path, output: Path, *more: str) -> list[str]:
    return [*arguments, f"experiment.output_dir={output}", f"experiment.generator_checkpoint={run}", *more]


def test_training_is_that_with_the_whole_tokenizer(run: Path, tokenizer_arguments: list[str], tmp_path: Path) -> None:
    train_rear.main(load_config([*tokenizer_arguments, *TRAINING, f"experiment.output_dir={tmp_path}"]))
    ours, theirs = (
        [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in read_metrics(path)]
        for path in (run / "metrics.jsonl", tmp_path / "metrics.jsonl")
    )
    assert ours == theirs
    assert {"train/proj_loss", "val/ar_loss"} <= {name for row in ours for name in row}
    log = (run / "log.txt").read_text()
    assert log.count("no sample grids: model.vq_model.model_type=codes_only has no decoder") == 1
    assert "wants images" not in log
    assert not (run / "train_generated_images").exists()
    assert (run / "training_curves.png").is_file()
    assert (run / "heldout_loss_by_position.png").is_file()


def test_sampled_codes_are_those_of_the_images(
    sampled: Path, run: Path, tokenizer_arguments: list[str], tmp_path: Path
) -> None:
    store = TokenStore(sampled)
    store.verify()
    assert (store.meta.num_samples, store.meta.codebook_size, store.meta.grid_size) == (37, 24, None)
    assert store.class_ids.tolist() == [i % 5 for i in range(37)]
    assert store.meta.tokenizer_sha256 == read_record(run / "model.safetensors")["tokenizer_sha256"]
    whole = load_config(sampling_of(tokenizer_arguments, run, tmp_path / "y", "experiment.allow_other_tokenizer=true"))
    sample_imagenet_rear.main(whole)
    decoded = load_tokenizer(whole).decode(torch.from_numpy(store.codes.astype(np.int64)))
    images = np.load(tmp_path / "y.npz")["arr_0"]
    assert abs(to_uint8(decoded, "truncate").astype(int) - images).max() <= 1
    assert sorted(path.name for path in sampled.parent.iterdir()) == ["x.json", "x.tokens", "x.yaml"]


@pytest.mark.parametrize("codebook_size", [65_536, 2**18])
def test_ids_of_a_large_codebook_are_stored_whole(
    tiny_arguments: list[str], tmp_path: Path, codebook_size: int
) -> None:
    config = load_config([*tiny_arguments, f"experiment.output_dir={tmp_path / 'x'}"])
    tokenizer = CodesOnly(replace(config.model.vq_model, codebook_size=codebook_size, model_type="codes_only"))
    codes = torch.tensor([[0, 255, 256, codebook_size - 1] * 4, [256, 511, 4096, 40_000] * 4])
    decoder = PassThroughDecoder(tokenizer.codebook_size)
    chunk_files = SampleChunks(tmp_path / "chunks", 2, 2)
    chunk_files.open({})
    chunk_files.save(range(2), decoder.finish(decoder.start(codes)))
    labels = np.array([0, 1])
    sample_imagenet_rear.pack_codes(chunk_files, tmp_path / "x.tokens", tokenizer, config, labels, {}, {})
    assert TokenStore(tmp_path / "x.tokens").codes.tolist() == codes.tolist()


@pytest.mark.multiprocess
def test_two_processes_sample_the_same_bytes(sampled: Path, arguments: list[str], run: Path, tmp_path: Path) -> None:
    command = ["scripts/sample_imagenet_rear.py", *sampling_of(arguments, run, tmp_path / "two")]
    done = run_script(command, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert f"37 samples in {tmp_path / 'two.tokens'}: decode its tokens.npy, uint16 (37, 16), with the" in done.stdout
    for file in ("tokens.npy", "class_ids.npy", "meta.json"):
        assert (tmp_path / "two.tokens" / file).read_bytes() == (sampled / file).read_bytes()


def test_what_is_sampled_is_not_sampled_again(
    sampled: Path, arguments: list[str], run: Path, capsys: pytest.CaptureFixture
) -> None:
    command = sampling_of(arguments, run, sampled.with_suffix(""))
    sample_imagenet_rear.main(load_config(command))
    assert f"{sampled}: already made" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"x\.tokens: .*sampling\.seed: found 42, expected 1;"):
        sample_imagenet_rear.main(load_config([*command, "sampling.seed=1"]))


def test_codes_and_images_of_one_name_are_refused(
    sampled: Path, run: Path, arguments: list[str], tokenizer_arguments: list[str], tmp_path: Path
) -> None:
    images = sampling_of(tokenizer_arguments, run, sampled.with_suffix(""), "experiment.allow_other_tokenizer=true")
    with pytest.raises(InputError, match=r"x\.tokens: is of another run"):
        sample_imagenet_rear.main(load_config(images))
    (tmp_path / "z.npz").touch()
    with pytest.raises(InputError, match=r"z\.npz: is of another run"):
        sample_imagenet_rear.main(load_config(sampling_of(arguments, run, tmp_path / "z")))
    assert sorted(path.name for path in sampled.parent.iterdir()) == ["x.json", "x.tokens", "x.yaml"]


def test_sampled_codes_are_counted_and_trained_on(sampled: Path, arguments: list[str], tmp_path: Path, capsys) -> None:
    on_samples = [*arguments, f"dataset.params.pretokenization={sampled}", f"experiment.output_dir={tmp_path / 'x'}"]
    inspect_codes.main(script_config(inspect_codes, on_samples))
    printed = capsys.readouterr().out
    assert "codes per sample: 16, without a grid" in printed
    assert f"look at {tmp_path / 'x'}/statistics.png" in printed
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["statistics.json", "statistics.png"]
    train_rear.main(load_config([*on_samples, "training.max_train_steps=1"]))
    assert len(read_metrics(tmp_path / "x/metrics.jsonl")) == 1


def test_what_wants_images_is_refused(sampled: Path, arguments: list[str], run: Path, tmp_path: Path) -> None:
    images = make_noise_images(tmp_path / "images", 2, 16, 16)
    arguments = [*arguments, f"experiment.output_dir={tmp_path / 'out'}"]
    arguments += [f"dataset.params.{split}_shards_path_or_url={images}" for split in ("train", "eval")]
    on_images = "dataset.params.pretokenization=null"
    held_out = ("experiment.eval_every=1", "dataset.params.eval_pretokenization=null")
    refused = [
        (pretokenize, f"dataset.params.pretokenization={tmp_path / 'new.tokens'}"),
        (reconstruct, "sampling.seed=1"),
        (train_rear, on_images),
        (train_rear, *held_out),
        (train_rear, "experiment.eval_every=1", "experiment.eval_samples=2"),
        (sample_imagenet_rear, "sampling.save_png=true", f"experiment.generator_checkpoint={run}"),
        (sweep_guidance, f"sweep.reference={tmp_path / 'x.npz'}"),
        (complete_images, f"completion.inputs={images}"),
    ]
    for script, *more in refused:
        with pytest.raises(InputError, match="model_type=codes_only"):
            script.main(script_config(script, [*arguments, *more]))
    with pytest.raises(InputError, match="model_type=codes_only"):
        DemoModel(load_config([*arguments, f"experiment.generator_checkpoint={run}"]))
    with pytest.raises(InputError, match=r"x\.tokens: found codes, expected an npz of images"):
        open_input(sampled, verify=False)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file() and images not in path.parents}
    assert left <= {".lock"}


BAD_CODEBOOKS = {
    "of another shape": (np.zeros((24, 9), np.float32), r"1 of another shape \(codebook \(24, 9\) instead of \(24, 8"),
    "no table": (np.zeros(24, np.float32), r"found float32 \(24,\), expected finite floats \(V, Z\)"),
    "of integers": (np.zeros((24, 8), np.int64), r"found int64 \(24, 8\), expected finite floats"),
    "with NaN": (np.full((24, 8), np.nan), r"found float64 \(24, 8\), expected finite floats"),
    "beyond float32": (np.full((24, 8), 1e39), r"found float64 \(24, 8\), expected finite floats"),
    "of objects": (np.array([{}]), "cannot be read as a NumPy array"),
    "of no bytes": (None, "cannot be read as a NumPy array"),
}


@pytest.mark.parametrize("case", BAD_CODEBOOKS)
def test_a_bad_codebook_is_named(arguments: list[str], tmp_path: Path, case: str) -> None:
    codebook, message = BAD_CODEBOOKS[case]
    if codebook is None:
        (tmp_path / "bad.npy").touch()
    else:
        np.save(tmp_path / "bad.npy", codebook)
    wrong = [f"experiment.output_dir={tmp_path / 'x'}", f"experiment.tokenizer_checkpoint={tmp_path / 'bad.npy'}"]
    with pytest.raises(InputError, match=rf"bad\.npy: .*{message}"):
        train_rear.main(load_config([*arguments, *wrong]))
    assert not (tmp_path / "x").exists()


def test_the_number_of_codes_is_given(arguments: list[str], tmp_path: Path) -> None:
    wrong = [f"experiment.output_dir={tmp_path / 'x'}", "model.vq_model.num_latent_tokens=12"]
    config = load_config([*arguments, *wrong, "model.generator.image_seq_len=12"])
    with pytest.raises(InputError, match=r"codes\.tokens: found image_seq_len=16, expected 12"):
        train_rear.main(config)


def test_the_page_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and codebook of docs/tokenizers.md from elsewhere, its commands in their order, and a way back; but fewer
    steps and samples."""
    codes, rng = tmp_path / "outputs/codes_only/codes.jsonl", np.random.default_rng(0)
    codes.parent.mkdir(parents=True)
    lines = [{"class_id": i % 12, "tokens": rng.integers(0, 512, 64).tolist()} for i in range(40)]
    codes.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    np.save(codes.with_name("codebook.npy"), rng.standard_normal((512, 32)))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    [block] = [block for _, block in fences(ROOT / "docs/tokenizers.md") if "inspect_codes" in block]
    few = ["training.max_train_steps=2", "lr_scheduler.params.warmup_steps=1", "sampling.num_fid_samples=12"]
    for command in block.splitlines():
        _, words = split(command)
        script = import_module(words[1].removesuffix(".py").replace("/", "."))
        script.main(script_config(script, [*words[2:], *few]))
    samples = TokenStore(codes.with_name("samples.tokens"))
    assert (len(samples), samples.meta.image_seq_len, samples.meta.codebook_size) == (12, 64, 512)
    convert_tokens.main([str(samples.path), "samples.jsonl"])
    assert json.loads(Path("samples.jsonl").read_text().splitlines()[11])["tokens"] == samples.codes[11].tolist()
