"""What a path to weights means; runs and damaged checkpoints are in tests/faults/test_provenance.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from utils.errors import InputError
from utils.files.weights import load_state_dict, save_weights
from utils.run.checkpoint import write_checkpoint
from utils.run.manifest import Provenance, TrainingState
from utils.run.resume import find_start
from utils.run.weights_path import PUBLISHED_FILES, find_run_folder, find_weights, resolve_path

STATE = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}


def write_run(folder: Path, step: int = 4) -> Path:
    optimizer = {"state": {}, "param_groups": []}
    snapshot = {"model.safetensors": STATE, "ema.safetensors": STATE, "optimizer.bin": optimizer}
    return write_checkpoint(folder, TrainingState(step, 16, 16 * step), Provenance(), snapshot)


def write_shards(folder: Path) -> Path:
    for key, value in STATE.items():
        save_weights({key: value}, folder / f"{key}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: f"{key}.safetensors" for key in STATE}}))
    return index


def test_a_run_a_checkpoint_and_a_file_in_it(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path)
    assert (resolve_path(str(tmp_path)).kind, resolve_path(str(checkpoint)).kind) == ("run", "checkpoint")
    for source in (tmp_path, checkpoint):
        assert find_weights(str(source)).path == checkpoint / "ema.safetensors"
    model = find_weights(str(checkpoint / "model.safetensors"))
    assert (model.path, model.step) == (checkpoint / "model.safetensors", 4)
    (tmp_path / "config.yaml").touch()
    for path in (tmp_path, checkpoint, model.path):
        assert find_run_folder(find_weights(str(path))) == tmp_path


def test_a_file_of_another_origin_does_not_belong_to_the_run_around_it(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "config.yaml").touch()
    own = Provenance(data_hash="").record(4)
    for name, record, is_of_run in (
        ("model.safetensors", own, True),
        ("weights/0000003.safetensors", {**own, "step": 3}, True),
        ("weights/0000003.safetensors", {**own, "step": 3, "data": "other"}, False),
        ("model.safetensors", {**own, "code": "other"}, False),
        ("model.safetensors", None, False),  # a published file
        ("foreign.safetensors", own, False),
        ("weights/best.safetensors", own, False),
        ("unwrapped_model/model.safetensors", None, False),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        save_weights(STATE, path, record)
        assert (find_run_folder(find_weights(str(path))) == tmp_path) == is_of_run, (name, record)
        path.unlink()
    shutil.rmtree(tmp_path / "checkpoint-4")  # nothing contradicts, and the folder has the published layout
    save_weights(STATE, tmp_path / "unwrapped_model/model.safetensors")
    assert find_run_folder(find_weights(str(tmp_path / "unwrapped_model/model.safetensors"))) == tmp_path


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_a_folder_in_the_published_layout_is_its_weights(tmp_path: Path, name: str) -> None:
    path = tmp_path / "published" / name
    path.parent.mkdir(parents=True)
    torch.save(STATE, path)
    for source in (path, tmp_path / "published"):
        assert resolve_path(str(source)).kind == "weights"
        assert find_weights(str(source)).path == path
        start = find_start(tmp_path / "run", str(source))
        assert (start.checkpoint, start.weights_only) == (str(path), True)


def test_a_folder_of_shards_is_their_index(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    found = find_weights(str(tmp_path))
    assert (found.path, found.step, found.tokenizer_sha256, found.record) == (index, None, None, {})
    assert load_state_dict(found.path).keys() == STATE.keys()
    assert find_start(tmp_path / "run", str(tmp_path)).checkpoint == str(index)
    (tmp_path / "other.index.json").touch()
    with pytest.raises(InputError, match=f"{tmp_path}: found 2"):
        find_weights(str(tmp_path))


def test_weights_remember_step_and_tokenizer(tmp_path: Path) -> None:
    save_weights(STATE, tmp_path / "w.safetensors", {"step": 7, "tokenizer_sha256": "abc"})
    found = find_weights(str(tmp_path / "w.safetensors"))
    assert (found.step, found.tokenizer_sha256) == (7, "abc")


def test_a_path_without_weights_is_refused(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=f"^{source}: "):
            find_weights(str(source))


def test_a_damaged_file_in_a_checkpoint_does_not_start_a_run(tmp_path: Path) -> None:
    model = write_run(tmp_path / "run") / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    with pytest.raises(InputError, match="sha256"):
        find_start(tmp_path / "new", str(model))


def test_a_run_that_starts_from_the_hub_resumes_its_own_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = tmp_path / "w.safetensors"
    save_weights(STATE, published)
    monkeypatch.setattr("utils.run.weights_path.local_file", lambda source: published)
    source = "hf://someone/model/w.safetensors"
    start = find_start(tmp_path / "run", source)
    assert (start.checkpoint, start.weights_only, start.back_up) == (str(published), True, ())
    snapshot = {"model.safetensors": STATE}
    state = TrainingState(4, 16, 64, started_from=source)
    own = write_checkpoint(tmp_path / "run", state, Provenance(), snapshot)
    start = find_start(tmp_path / "run", source)
    assert (start.checkpoint, start.weights_only) == (str(own), False)
    assert find_start(tmp_path / "run", "hf://someone/model/other.safetensors").back_up == (own,)
