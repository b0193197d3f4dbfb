"""Weights as other programs save them: what is read, and what is refused."""

import argparse
import json
import pickle
import re
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
        (prefixed("module."), "removed the prefix 'module.'"),
        (prefixed("_orig_mod.module."), "removed the prefix '_orig_mod.', removed the prefix 'module.'"),
        (prefixed("ema."), "removed the prefix 'ema.'"),
        ({"state_dict": STATE, "epoch": 3, "optimizer": {"state": {}}}, "used the state dict under 'state_dict'"),
        ({"model": STATE, "step": torch.tensor(5)}, "used the state dict under 'model'"),
        ({"generator": prefixed("module.")}, "used the state dict under 'generator', removed the prefix 'module.'"),
    ],
)
def test_a_known_wrapper_is_removed_and_reported_in_one_line(
    tmp_path: Path, capsys: Any, contents: Any, line: str
) -> None:
    torch.save(contents, tmp_path / "w.ckpt")
    assert_read(tmp_path / "w.ckpt")
    out = capsys.readouterr().out
    assert out == f"{tmp_path / 'w.ckpt'}: {line}\n"


def test_one_rank_prints_the_line(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    torch.save({"model": STATE}, tmp_path / "w.pt")
    assert_read(tmp_path / "w.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("contents", "found"),
    [
        ({"model": STATE, "ema": STATE}, "under model, ema"),
        (prefixed("ema.") | prefixed("model."), r"2 of 4 keys begin with 'model\.'"),
        (prefixed("module.") | {"n_averaged": torch.tensor(3)}, r"2 of 3 keys begin with 'module\.'"),
        ({"net": STATE}, "found a dict under 'net'"),
        ({"model": {"state_dict": STATE}}, "found a dict under 'state_dict'"),
        ({"model": {"weight": 1.0}}, "found a float under 'weight'"),
        ({"weight": STATE["weight"].to_sparse()}, "found a Tensor under 'weight'"),
        ({7: STATE["bias"]}, "found a Tensor under 7"),
        ([STATE["bias"]], "found a list"),
        (STATE["bias"], "found a Tensor"),
        ({"args": argparse.Namespace(lr=1)} | STATE, r"refused: .* argparse\.Namespace"),
    ],
)
def test_what_is_ambiguous_is_refused(tmp_path: Path, contents: Any, found: str) -> None:
    torch.save(contents, tmp_path / "w.ckpt")
    assert re.search(found, refusal(tmp_path / "w.ckpt"))


def test_no_key_of_our_own_is_taken_for_a_wrapper() -> None:
    with torch.device("meta"):
        modules = [ReAR(ModelConfig()), *(kind(SIZES[name]) for name, kind in TOKENIZERS.items())]
    assert not [key for module in modules for key in module.state_dict() if key.split(".")[0] in WRAPPERS]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "found an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS.*git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page.*/resolve/"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b'{"error": "Repository not found"}', 'begins with .*"error"'),
        (b"GGUF\3\0\0\0", "begins with b'GGUF"),
        (b"PK\x03\x04" + bytes(100), "refused"),
        (pickle.dumps([1, 2]), "refused"),
        (pickle.dumps({"w": np.ones(3)}, protocol=2), "refused: .* numpy"),
    ],
)
@pytest.mark.parametrize("name", ["w.bin", "w.safetensors"])
def test_what_is_no_weights_file_is_refused(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(found, refusal(tmp_path / name))


def test_archives_of_other_kinds_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", weight=np.ones(3))
    torch.jit.script(torch.nn.Linear(3, 2)).save(str(tmp_path / "w.pt"))
    for name in ("w.npz", "w.pt"):
        assert "refused" in refusal(tmp_path / name)


@pytest.mark.parametrize("kept", [0.0, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["torch", "old_torch", "safetensors"])
def test_a_file_that_was_cut_off(tmp_path: Path, kept: float, kind: str) -> None:
    state, path = {"w": torch.ones(500)}, tmp_path / "w.bin"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert str(path) in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, value: float, dtype: torch.dtype, save: Any) -> None:
    weight = torch.zeros(40, 50, dtype=dtype)
    weight[39, 49] = value
    save(STATE | {"weight": weight, "nothing": torch.zeros(0)}, tmp_path / "w.bin")
    assert "w.bin: 1 of 3 tensors hold NaN or infinity (weight)" in refusal(tmp_path / "w.bin")


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
def index(tmp_path: Path) -> Path:
    """Of STATE in two files."""
    save_file({"weight": STATE["weight"]}, tmp_path / "w-1.safetensors")
    save_file({"bias": STATE["bias"]}, tmp_path / "w-2.safetensors")
    return write_index(tmp_path, {"weight": "w-1.safetensors", "bias": "w-2.safetensors"})


def write_index(folder: Path, weight_map: dict[str, str]) -> Path:
    path = folder / "w.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_shards_with_an_index(index: Path, capsys: Any) -> None:
    assert_read(index)
    assert capsys.readouterr().out == f"{index}: joined 2 shards\n"


def test_shards_that_differ_from_their_index(index: Path) -> None:
    second = index.parent / "w-2.safetensors"
    save_file({"bias": torch.tensor([1.0, torch.nan])}, second)
    assert "w-2.safetensors: 1 of 1 tensors hold NaN" in refusal(index)
    save_file({"bias": STATE["bias"], "weight": STATE["weight"]}, second)
    assert re.search(r"w-2\.safetensors: 1 .*\(weight\)", refusal(index))
    second.unlink()
    assert "1 of 2 shards are missing (w-2.safetensors)" in refusal(index)
    write_index(index.parent, {"weight": "../w-1.safetensors"})
    assert "../w-1.safetensors" in refusal(index)
    index.write_text('{"weights": {}}')
    assert "KeyError: 'weight_map'" in refusal(index)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "found a folder" in refusal(tmp_path)
