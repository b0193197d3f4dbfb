"""Weights as other programs leave them: what is read, and what is refused by the name of what it is."""

import argparse
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modeling.rear import ReAR
from modeling.tokenizers.registry import TOKENIZERS
from tests.modeling.tokenizers.test_conformance import SIZES
from utils.errors import InputError
from utils.files.weights import WRAPPERS, check_fits, load_state_dict, load_strict
from utils.schema import ModelConfig

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_state_dict(path)
    message = str(caught.value)
    assert message.startswith(str(path.parent))
    assert "\n" not in message
    return message


def assert_read(path: Path) -> None:
    found = load_state_dict(path)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key], STATE[key]) for key in STATE)


def prefixed(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".safetensors", ""])
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_the_content_decides_and_not_the_name(tmp_path: Path, capsys: Any, suffix: str, save: Any) -> None:
    save(STATE, tmp_path / f"w{suffix}")
    assert_read(tmp_path / f"w{suffix}")
    assert capsys.readouterr().out == ""


def test_the_old_format_of_torch(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert_read(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("contents", "line"),
    [
        (prefixed("module."), "without the prefix 'module' of all its keys"),
        (prefixed("_orig_mod.module."), "without the prefix '_orig_mod' of all its keys, without the prefix 'module'"),
        (prefixed("ema."), "without the prefix 'ema'"),
        ({"state_dict": STATE, "epoch": 3, "optimizer": {"state": {}}}, "from under 'state_dict'"),
        ({"model": STATE, "step": torch.tensor(5)}, "from under 'model'"),
        ({"generator": prefixed("module.")}, "from under 'generator', without the prefix 'module'"),
    ],
)
def test_one_name_or_prefix_is_taken_off_in_one_line(tmp_path: Path, capsys: Any, contents: Any, line: str) -> None:
    torch.save(contents, tmp_path / "w.ckpt")
    assert_read(tmp_path / "w.ckpt")
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'w.ckpt'}: read {line}")
    assert out.count("\n") == 1


def test_one_rank_prints_the_line(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    torch.save({"model": STATE}, tmp_path / "w.pt")
    assert_read(tmp_path / "w.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("contents", "found"),
    [
        ({"model": STATE, "ema": STATE}, "a dict under each of 'model', 'ema', expected one of them; save"),
        (prefixed("ema.") | prefixed("model."), "2 of 4 keys begin with 'model', expected all or none; save"),
        (
            prefixed("module.") | {"n_averaged": torch.tensor(3)},
            "2 of 3 keys begin with 'module', expected all or none",
        ),
        ({"net": STATE}, "by itself or under one of state_dict, model, .* found a dict under 'net'"),
        ({"model": {"state_dict": STATE}}, "found a dict under 'state_dict'"),
        ({"model": {"weight": 1.0}}, "found a float under 'weight'"),
        ({"weight": STATE["weight"].to_sparse()}, "found a Tensor under 'weight'"),
        ({7: STATE["bias"]}, "found a Tensor under 7"),
        ([STATE["bias"]], "found a list"),
        (STATE["bias"], "found a Tensor"),
        (
            {"args": argparse.Namespace(lr=1)} | STATE,
            r"other objects than tensors \(argparse.Namespace\).* save the tensor",
        ),
    ],
)
def test_what_leaves_a_choice_is_refused(tmp_path: Path, contents: Any, found: str) -> None:
    torch.save(contents, tmp_path / "w.ckpt")
    with pytest.raises(InputError, match=found):
        load_state_dict(tmp_path / "w.ckpt")
    assert refusal(tmp_path / "w.ckpt")


def test_no_key_of_our_own_is_taken_for_a_wrapper() -> None:
    with torch.device("meta"):
        modules = [ReAR(ModelConfig()), *(kind(SIZES[name]) for name, kind in TOKENIZERS.items())]
    assert not [key for module in modules for key in module.state_dict() if key.split(".")[0] in WRAPPERS]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer.*git lfs pull"),
        (b"/annex/objects/SHA256E-s9--0.bin\n", "a git-annex pointer"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page .*/resolve/ instead of /blob/"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
        (b'{"error": "Repository not found"}', "JSON text"),
        (b"Entry not found", "text that begins with 'Entry not found'"),
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x93NUMPY\1\0", "a NumPy array"),
        (b"\x89PNG\r\n\x1a\n", "an image"),
        (b"\x1f\x8b\x08\0", "a compressed file"),
        (b"\x08\x07\x12\x07pytorch", "a file that begins with b"),
        (b"PK\x03\x04" + bytes(100), "cut off or damaged"),
        (pickle.dumps([1, 2]), "a pickle that torch.save did not write"),
        (pickle.dumps({"w": np.ones(3)}, protocol=2), r"other objects than tensors \(numpy"),
    ],
)
@pytest.mark.parametrize("name", ["w.bin", "w.safetensors"])
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=found):
        load_state_dict(tmp_path / name)
    assert refusal(tmp_path / name)


def test_archives_of_other_kinds(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", weight=np.ones(3))
    assert "found a NumPy npz" in refusal(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("weights/w.bin", b"")
    assert "found a zip archive" in refusal(tmp_path / "w.zip")
    torch.jit.script(torch.nn.Linear(3, 2)).save(str(tmp_path / "w.pt"))
    assert "found a TorchScript archive" in refusal(tmp_path / "w.pt")
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        archive.add(tmp_path / "w.npz", "w.npz")
    assert "an archive; unpack it first" in refusal(tmp_path / "w.tar")


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("old_torch", [False, True])
def test_a_file_of_torch_that_was_cut_off(tmp_path: Path, kept: float, old_torch: bool) -> None:
    torch.save({"w": torch.ones(500)}, tmp_path / "w.bin", _use_new_zipfile_serialization=not old_torch)
    whole = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(whole[: int(kept * len(whole))])
    assert "cut off or damaged" in refusal(tmp_path / "w.bin")


def test_a_file_of_safetensors_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    save_file(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"not a complete safetensors file, {len(whole) - 1} bytes, expected at least {len(whole)}" in refusal(path)
    path.write_bytes(whole[:30])
    assert "30 bytes, expected at least" in refusal(path)
    path.write_bytes(whole + b"\0")
    assert f"{len(whole) + 1} bytes, expected {len(whole)}" in refusal(path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "w.bin").touch()
    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read: Permission denied" in refusal(tmp_path / "w.bin")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, value: float, dtype: torch.dtype, save: Any) -> None:
    weight = torch.zeros(40, 50, dtype=dtype)
    weight[39, 49] = value
    save(STATE | {"weight": weight, "nothing": torch.zeros(0)}, tmp_path / "w.bin")
    assert "w.bin: 1 of 3 tensors hold NaN or infinity (weight), expected finite" in refusal(tmp_path / "w.bin")


def test_finite_is_meant_in_float32(tmp_path: Path) -> None:
    largest = {"w": torch.tensor([torch.finfo(torch.float32).max, torch.finfo(torch.float32).min])}
    torch.save(largest, tmp_path / "w.bin")
    assert torch.equal(load_state_dict(tmp_path / "w.bin")["w"], largest["w"])
    torch.save({"w": torch.tensor([1e300], dtype=torch.float64)}, tmp_path / "w.bin")
    assert "NaN or infinity (w)" in refusal(tmp_path / "w.bin")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_floats_are_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save(STATE | {"weight": torch.ones(2, 3).to(dtype)}, tmp_path / "w.bin")
    module, found = torch.nn.Linear(3, 2), load_state_dict(tmp_path / "w.bin")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=rf"1 of another type \(weight {name} instead of float32\)"):
        load_strict(module, found, "w.bin")


def test_integers_are_integers() -> None:
    module = torch.nn.BatchNorm1d(3)
    state = module.state_dict()
    check_fits(module, state | {"num_batches_tracked": torch.tensor(1, dtype=torch.int32)}, "w")
    for value in (torch.tensor(1.0), torch.tensor(True)):
        with pytest.raises(InputError, match=r"num_batches_tracked .* instead of int64"):
            check_fits(module, state | {"num_batches_tracked": value}, "w")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with STATE in two files and their index."""
    save_file({"weight": STATE["weight"]}, tmp_path / "w-1.safetensors")
    save_file({"bias": STATE["bias"]}, tmp_path / "w-2.safetensors")
    write_index(tmp_path, {"weight": "w-1.safetensors", "bias": "w-2.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "w.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_with_an_index(shards: Path, capsys: Any) -> None:
    for path in (shards, shards / "w.safetensors.index.json"):
        assert_read(path)
        assert capsys.readouterr().out == f"{shards / 'w.safetensors.index.json'}: read from 2 shards\n"


def test_shards_that_are_not_as_their_index_says(shards: Path) -> None:
    save_file({"bias": torch.tensor([1.0, torch.nan])}, shards / "w-2.safetensors")
    assert "w-2.safetensors: 1 of 1 tensors hold NaN" in refusal(shards)
    save_file({"bias": STATE["bias"], "weight": STATE["weight"]}, shards / "w-2.safetensors")
    assert "w-2.safetensors: found other keys than w.safetensors.index.json says: 1 differ (weight)" in refusal(shards)
    (shards / "w-2.safetensors").unlink()
    assert "1 of 2 shards are not there (w-2.safetensors)" in refusal(shards)
    write_index(shards, {"weight": "../w-1.safetensors"})
    assert "expected names of files beside it" in refusal(shards)
    (shards / "w.safetensors.index.json").write_text('{"weights": {}}')
    assert "not an index of shards: KeyError: 'weight_map'" in refusal(shards)
    (shards / "other.index.json").touch()
    assert "expected one *.index.json in it: found other.index.json, w.safetensors.index.json" in refusal(shards)


def test_folders_without_an_index(tmp_path: Path) -> None:
    assert "expected one *.index.json in it: found no index; name a weights file" in refusal(tmp_path)
    (tmp_path / "__0_0.distcp").touch()
    assert "dcp_to_torch" in refusal(tmp_path)
