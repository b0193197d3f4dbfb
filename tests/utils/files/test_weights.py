import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from utils.errors import InputError
from utils.files.weights import RECORD, load_state_dict, load_strict, read_record, weights_sha256


class Exploit:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(3, 2)


@pytest.mark.parametrize("name", ["w.bin", "w.safetensors"])
def test_round_trip_from_half_precision(tmp_path: Path, linear: nn.Linear, name: str) -> None:
    half = {key: value.detach().half() for key, value in linear.state_dict().items()}
    (torch.save if name.endswith(".bin") else save_file)(half, tmp_path / name)
    other = nn.Linear(3, 2)
    load_strict(other, load_state_dict(tmp_path / name), tmp_path / name)
    assert other.weight.dtype == torch.float32
    torch.testing.assert_close(other.weight, linear.weight.half().float(), atol=0, rtol=0)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"w\.bin: no such weights file"):
        load_state_dict(tmp_path / "w.bin")


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": Exploit(f"touch {tmp_path / 'harm'}")}, tmp_path / "w.bin")
    with pytest.raises(InputError, match="refused") as caught:
        load_state_dict(tmp_path / "w.bin")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_differences_are_counted_and_named(linear: nn.Linear) -> None:
    before = linear.weight.detach().clone()
    state = {"weight": torch.zeros(2, 4), **{f"extra{i}": torch.zeros(1) for i in range(5)}}
    with pytest.raises(InputError) as caught:
        load_strict(linear, state, "made up")
    assert str(caught.value) == (
        "made up: does not fit Linear as configured: 1 missing (bias); 5 unexpected (extra0, extra1, extra2, ...); "
        "1 of another shape (weight (2, 4) instead of (2, 3))"
    )
    torch.testing.assert_close(linear.weight, before)


def test_the_hash_is_that_of_the_values(linear: nn.Linear) -> None:
    other = nn.Linear(3, 2)
    other.load_state_dict(linear.state_dict())
    assert weights_sha256(other) == weights_sha256(linear)
    other.bias.data[1] += 1e-6
    assert weights_sha256(other) != weights_sha256(linear)
    assert weights_sha256(linear.bfloat16()) != weights_sha256(other)


@pytest.mark.parametrize(
    "text", ["[1]", "3", "{", "[" * 100_000, '{"step": "9"}', '{"tokenizer_sha256": [1]}', '{"data": {"a": 1}}']
)
def test_a_record_of_other_types_is_damage(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", {RECORD: text})
    for read in (read_record, load_state_dict):
        with pytest.raises(InputError, match=r"w\.safetensors: damaged, found no valid [\w-]+ in its metadata"):
            read(tmp_path / "w.safetensors")
