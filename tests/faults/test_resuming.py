"""Rows 9 to 15, 17 and 18 of the fault matrix: what a run finds when it starts again."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.runs import Run, assert_equal_runs
from utils.config import load_config
from utils.config_checks import accumulation_steps, check_training
from utils.errors import InputError
from utils.keys import ConfigError
from utils.run.checkpoint import Resumable, load_optimizers
from utils.run.manifest import MANIFEST_FILE, read_manifest
from utils.run.metrics_file import read_metrics
from utils.run.resume import find_start
from utils.run.weights_path import find_weights

FILES = ["model.safetensors", "optimizer.bin", MANIFEST_FILE]


def copy_of(oracle: Run, folder: Path) -> Run:
    """The finished run again, with checkpoints 8 and 12, as if it had not been reported complete."""
    shutil.copytree(oracle.folder, folder)
    (folder / "model.safetensors").unlink()
    run = Run(oracle.arguments[:-1], folder)
    run.records = list(oracle.records)
    return run


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
@pytest.mark.parametrize("file", FILES)
def test_rows_9_10_a_damaged_checkpoint_is_named_and_passed_over(oracle: Run, tmp_path: Path, damage, file) -> None:
    run = copy_of(oracle, tmp_path / "run")
    damage(run.folder / "checkpoint-12" / file)
    before = (run.folder / "checkpoint-12" / file).read_bytes()
    with pytest.raises(InputError, match="checkpoint-12"):  # by name it is an error
        find_start(run.folder, str(run.folder / "checkpoint-12"))
    run.completed()
    assert f"skipped: {run.folder / 'checkpoint-12'}" in run.log()
    assert "steps 8 to 12" in run.log()
    assert_equal_runs(run, oracle)
    assert (run.folder / "checkpoint-12.aside" / file).read_bytes() == before


def test_rows_9_10_a_missing_file_or_manifest(oracle: Run, tmp_path: Path) -> None:
    run = copy_of(oracle, tmp_path / "run")
    (run.folder / "checkpoint-12/optimizer.bin").unlink()
    start = find_start(run.folder, "auto")
    assert start.checkpoint == str(run.folder / "checkpoint-8")
    assert "optimizer.bin: found no file, expected" in start.notices[0]
    (run.folder / "checkpoint-12" / MANIFEST_FILE).unlink()
    assert "found no manifest.json" in find_start(run.folder, "auto").notices[0]


@pytest.mark.parametrize("resume", ["auto", "true"])
def test_row_11_never_silently_from_scratch(run: Run, oracle: Run, tmp_path: Path, resume: str) -> None:
    damaged = copy_of(oracle, tmp_path / "damaged")
    for step in (8, 12):
        flip_a_bit(damaged.folder / f"checkpoint-{step}/model.safetensors")
    metrics = (damaged.folder / "metrics.jsonl").read_bytes()
    assert damaged(f"experiment.resume={resume}") == [1]
    assert "all checkpoints are damaged: skipped:" in damaged.output()
    assert all(name in damaged.output() for name in ("checkpoint-12", "checkpoint-8"))
    assert (damaged.folder / "metrics.jsonl").read_bytes() == metrics
    assert run("experiment.resume=true") == [1]
    assert "experiment.resume=true: no complete checkpoint in" in run.output()
    assert not run.folder.exists()


def test_row_12_foreign_names_are_ignored(oracle: Run, tmp_path: Path) -> None:
    run = copy_of(oracle, tmp_path / "run")
    for name in ("checkpoint-best", "checkpoint-12.bak", "checkpoint-99.tmp", "checkpoint-", "checkpoint-1e3"):
        shutil.copytree(run.folder / "checkpoint-12", run.folder / name)
    (run.folder / "checkpoint-77").write_text("a file")
    start = find_start(run.folder, "auto")
    assert start.checkpoint == str(run.folder / "checkpoint-12")
    assert start.notices == start.back_up == ()


def test_row_13_another_model_is_one_error_before_loading(oracle: Run, tmp_path: Path) -> None:
    run = copy_of(oracle, tmp_path / "run")
    assert run("model.generator.hidden_size=16", "model.generator.projection_dim=8") == [1]
    message = (
        "written by another model: model.generator.hidden_size=16, was 32; model.generator.projection_dim=8, was 16"
    )
    assert message in run.output()
    assert run.status() == oracle.status()  # nothing was touched


def test_row_13_a_changed_recipe_is_a_notice(oracle: Run, tmp_path: Path) -> None:
    run = copy_of(oracle, tmp_path / "run")
    run.completed("training.max_train_steps=13", "training.max_grad_norm=2", "experiment.log_every=2")
    notices = [line.split("since ")[1] for line in run.log().splitlines() if "since checkpoint-12" in line]
    assert notices == [
        "checkpoint-12: training.max_train_steps=13, was 12",
        "checkpoint-12: training.max_grad_norm=2.0, was 1.0",
    ]


@pytest.mark.parametrize("layout", ["model.safetensors", "unwrapped_model/pytorch_model.bin", None])
def test_row_14_the_published_layout_loads_with_a_notice(run: Run, oracle: Run, tmp_path: Path, layout) -> None:
    """As a folder in two layouts, and as a bare file."""
    weights = load_file(oracle.folder / "model.safetensors")
    published = tmp_path / "checkpoint-50000"
    path = published / (layout or "reAR-B.safetensors")
    path.parent.mkdir(parents=True)
    torch.save(weights, path) if path.suffix == ".bin" else save_file(weights, path)
    run.completed(f"experiment.resume={published if layout else path}", "training.max_train_steps=0")
    assert f"{path}: no manifest.json there" in run.log()
    loaded = load_file(run.folder / "model.safetensors")
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_row_14_strict_keys(run: Run, oracle: Run, tmp_path: Path) -> None:
    weights = load_file(oracle.folder / "model.safetensors")
    weights["extra"] = weights.pop("lm_head.bias")
    save_file(weights, tmp_path / "published.safetensors")
    assert run(f"experiment.resume={tmp_path / 'published.safetensors'}") == [1]
    assert "1 missing (lm_head.bias); 1 unexpected (extra)" in run.output()


class Exploit:
    """Unpickled with pickle.load, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["raw", "torch"])
def test_row_15_a_malicious_pickle_is_refused(run: Run, tmp_path: Path, kind: str) -> None:
    proof, weights = tmp_path / "proof", tmp_path / "weights.bin"
    payload = {"lm_head.bias": Exploit(proof)}
    weights.write_bytes(pickle.dumps(payload)) if kind == "raw" else torch.save(payload, weights)
    assert run(f"experiment.resume={weights}") == [1]
    assert f"{weights}: refused" in run.output()
    assert not proof.exists()
    torch.load(weights, weights_only=False) if kind == "torch" else pickle.loads(weights.read_bytes())
    assert proof.exists()  # so the file was dangerous


def test_row_15_nor_in_an_optimizer_file(oracle: Run, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    torch.save({"state": Exploit(proof)}, tmp_path / "optimizer.bin")
    model = torch.nn.Linear(1, 1)
    resumable = Resumable({"model": model}, {"optimizer": (model, torch.optim.AdamW(model.parameters()))})
    with pytest.raises(InputError, match=r"optimizer.bin: refused"):
        load_optimizers(tmp_path, resumable)
    assert not proof.exists()


def test_a_path_starts_a_new_run_once_and_then_the_same_command_continues(run: Run, oracle: Run) -> None:
    """A run started from another run's checkpoint; its own checkpoints then take precedence."""
    command = f"experiment.resume={oracle.folder / 'checkpoint-8'}"
    assert run(command, "training.stop_steps=10") == [0]
    assert "steps 8 to 10" in run.log()
    run.completed(command)
    assert "resuming checkpoint-10, which began with" in run.log()
    assert "steps 10 to 12" in run.log()
    ours, theirs = run.tensors(), oracle.tensors()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_path_inside_the_run_folder_goes_back(oracle: Run, tmp_path: Path) -> None:
    """Sampling from the run folder then uses the restarted run's weights, not the earlier final weights."""
    run = copy_of(oracle, tmp_path / "run")
    shutil.copy(oracle.folder / "model.safetensors", run.folder)
    command = f"experiment.resume={run.folder / 'checkpoint-8'}"
    assert run(command, "training.stop_steps=8") == [0]
    assert find_weights(str(run.folder)).step == 8
    (run.folder / "model.safetensors").unlink()
    run.completed(command)
    assert "checkpoint-12 is renamed" in run.log()
    assert "model.safetensors is renamed" in run.log()
    assert (run.folder / "model.safetensors.aside").read_bytes() == (oracle.folder / "model.safetensors").read_bytes()
    assert (run.folder / "checkpoint-12.aside").is_dir()
    assert_equal_runs(run, oracle)
    run.completed(command)
    assert "steps 12 to 12" in run.log()


def test_final_weights_are_of_no_use_to_their_own_run(oracle: Run, tmp_path: Path) -> None:
    run = copy_of(oracle, tmp_path / "run")
    own = Path(shutil.copy(oracle.folder / "model.safetensors", run.folder))
    with pytest.raises(InputError, match=r"resume=.*expected a checkpoint.*experiment\.output_dir"):
        find_start(run.folder, str(own))
    elsewhere = find_start(run.folder, str(oracle.folder / "model.safetensors"))
    assert elsewhere.back_up == tuple(run.folder / name for name in ("checkpoint-8", "checkpoint-12", own.name))


def test_resume_false_does_not_overwrite_a_run(oracle: Run) -> None:
    with pytest.raises(InputError, match=r"experiment\.resume=false: .* already holds checkpoint-12"):
        find_start(oracle.folder, "false")


def test_a_typo_in_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"experiment.resume=ture: no such path; expected auto, true, false"):
        find_start(tmp_path, "ture")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: found .*manifest\.json"):
        find_start(tmp_path, str(tmp_path / "empty"))


def test_the_manifest_says_what_was_trained(oracle: Run) -> None:
    manifest = read_manifest(oracle.folder / "checkpoint-12")
    assert (manifest.state.global_step, manifest.state.samples_seen, manifest.state.nonfinite_steps) == (12, 96, 0)
    assert set(manifest.files) == {"model.safetensors", "optimizer.bin"}
    assert manifest.provenance.config["training"]["max_train_steps"] == 12
    assert manifest.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(len(value) == 64 for value in (manifest.config_hash, manifest.provenance.data_hash))


@pytest.mark.multiprocess
def test_row_17_two_then_one_then_two_processes(plain_oracle: Run, tmp_path: Path) -> None:
    """Ids and learning rates are equal; sums over other slices round differently."""
    run = Run([*plain_oracle.arguments[:-1], "training.global_batch_size=8"], tmp_path / "run")
    run("training.stop_steps=4", "training.per_gpu_batch_size=4", processes=2)
    run("training.stop_steps=8", "training.per_gpu_batch_size=2")
    run.completed("training.per_gpu_batch_size=4", processes=2)
    assert "steps 4 to 8" in run.log()
    assert "8 per step on 1 processes" in run.log()
    assert run.ids() == plain_oracle.ids()
    ours, theirs = run.curves(), plain_oracle.curves()
    assert [row[-1] for row in ours] == [row[-1] for row in theirs]  # the learning rate
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5)
    assert run.tensors().keys() == plain_oracle.tensors().keys()


def test_row_17_accumulation_changes_at_resume(plain_oracle: Run, tmp_path: Path) -> None:
    run = Run(plain_oracle.arguments[:-1], tmp_path / "run")
    run("training.stop_steps=7")
    run.completed("training.per_gpu_batch_size=2", "training.gradient_accumulation_steps=4")
    assert run.ids() == plain_oracle.ids()
    torch.testing.assert_close(torch.tensor(run.curves()), torch.tensor(plain_oracle.curves()), rtol=1e-5, atol=1e-5)


def test_row_17_another_global_batch_is_an_error_unless_allowed(oracle: Run, tmp_path: Path) -> None:
    run = copy_of(oracle, tmp_path / "run")
    shutil.rmtree(run.folder / "checkpoint-12")
    run.records = []
    assert run("training.per_gpu_batch_size=4") == [1]
    assert "written at a global batch of 8 images, found 4" in run.output()
    run.completed("training.per_gpu_batch_size=4", "training.allow_batch_change=true")
    whole = [row for step in range(12) for row in oracle.ids()[step]]
    found = [row for step in range(8, 12) for row in run.ids()[step]]
    assert sorted(found) == sorted(whole[64:80])  # no sample is left out; a step sorts them by class
    state = read_manifest(run.folder / "checkpoint-12").state
    assert (state.global_batch_size, state.samples_seen) == (4, 80)
    run.completed("training.per_gpu_batch_size=4", "training.max_train_steps=14")
    assert sorted(run.ids()[12] + run.ids()[13]) == sorted(whole[80:88])


def test_global_batch_size_gives_the_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["experiment.output_dir=out", "training.global_batch_size=2048", "training.per_gpu_batch_size=64"]
    training = load_config(arguments).training
    assert [accumulation_steps(training, ctx) for ctx in (1, 8, 32)] == [32, 4, 1]
    with pytest.raises(ConfigError, match=r"=2048: expected a multiple of 320 = per_gpu_batch_size=64 \* 5 processes"):
        accumulation_steps(training, 5)
    with pytest.raises(ConfigError, match="expected a multiple of 4096"):
        accumulation_steps(training, 64)
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps=3: expected 4 for global_batch_size=2048"):
        accumulation_steps(load_config([*arguments, "training.gradient_accumulation_steps=3"]).training, 8)
    launched = {"WORLD_SIZE": 5, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match="expected a multiple of 320"):
        check_training(load_config(arguments))


def test_row_18_the_number_of_workers_has_no_effect(run: Run, oracle: Run) -> None:
    run("training.stop_steps=5", "dataset.params.num_workers_per_gpu=2")
    run.completed("dataset.params.num_workers_per_gpu=1")
    assert_equal_runs(run, oracle)


def test_resuming_a_completed_run_changes_nothing(oracle: Run, tmp_path: Path) -> None:
    run = copy_of(oracle, tmp_path / "run")
    inode = (run.folder / "checkpoint-12" / MANIFEST_FILE).stat().st_ino
    run.completed()
    assert_equal_runs(run, oracle)
    assert (run.folder / "checkpoint-12" / MANIFEST_FILE).stat().st_ino == inode


def test_fewer_steps_than_the_checkpoint_has_is_an_error(oracle: Run, tmp_path: Path) -> None:
    run = copy_of(oracle, tmp_path / "run")
    before = (run.folder / "config.yaml").read_bytes()
    assert run("training.max_train_steps=4") == [1]
    message = f"training.max_train_steps=4: expected at least 12, the step of {run.folder / 'checkpoint-12'}"
    assert message in run.output()
    assert (run.folder / "config.yaml").read_bytes() == before


def test_a_changed_optimizer_setting_is_what_runs(oracle: Run, tmp_path: Path) -> None:
    run = copy_of(oracle, tmp_path / "run")
    run.completed("training.max_train_steps=13", "optimizer.params.beta2=0.5")
    assert "optimizer.params.beta2=0.5, was 0.96" in run.log()
    saved = torch.load(run.folder / "checkpoint-13/optimizer.bin", weights_only=True)
    assert all(group["betas"][1] == 0.5 for group in saved["param_groups"])


def test_an_ema_may_start_in_the_middle_of_a_run(oracle: Run, tmp_path: Path) -> None:
    run = copy_of(oracle, tmp_path / "run")
    run.completed("training.max_train_steps=13", "training.use_ema=true")
    assert "checkpoint-12 has no EMA: it starts from the weights of this step" in run.log()
    start, end = (load_file(run.folder / f"checkpoint-{step}/model.safetensors") for step in (12, 13))
    ema = load_file(run.folder / "checkpoint-13/ema.safetensors")
    for key in ema:  # its age, not the step of the run, decides its decay
        torch.testing.assert_close(ema[key], start[key].lerp(end[key], 0.9))
    run.completed("training.max_train_steps=14", "training.use_ema=true")
    assert [read_manifest(run.folder / f"checkpoint-{step}").state.ema_start for step in (13, 14)] == [12, 12]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_a_run_with_muon_and_parameter_groups_learns_and_resumes_exactly(
    tiny_arguments: list[str], tmp_path: Path
) -> None:
    groups = "optimizer.param_groups=[{pattern: embed, lr_factor: 0.5, weight_decay: 0.1}, {pattern: fc, lr_factor: 2}]"
    arguments = [*tiny_arguments, "optimizer.name=muon", groups, "training.max_train_steps=20"]
    whole = Run(arguments, tmp_path / "whole").completed()
    losses = [row["train/loss"] for row in read_metrics(whole.folder / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.1
    assert (whole.folder / "checkpoint-20/muon.bin").is_file()
    parts = Run(arguments, tmp_path / "parts")
    parts.completed("training.stop_steps=9")
    parts.completed()
    assert_equal_runs(parts, whole)

    assert parts("optimizer.name=adamw") == [1]
    assert "optimizer.name=adamw, was muon" in parts.output()
    weights = parts.folder / "checkpoint-20/model.safetensors"
    Run(arguments, tmp_path / "other").completed(
        f"experiment.resume={weights}", "optimizer.name=adamw", "training.max_train_steps=1"
    )
