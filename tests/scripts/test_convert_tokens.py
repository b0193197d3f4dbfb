"""The command that converts both ways, and its errors."""

import json
from pathlib import Path

import pytest

from data.codes.token_store import TokenStore
from scripts import convert_tokens
from utils.errors import InputError

SIZES = ["--codebook-size", "24", "--image-seq-len", "16", "--num-classes", "5"]


@pytest.fixture
def jsonl(tiny_config_file: Path, tmp_path: Path) -> Path:
    (tmp_path / "codes.jsonl").write_bytes((tiny_config_file.parent / "codes.jsonl").read_bytes())
    return tmp_path / "codes.jsonl"


def test_there_and_back(jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "names.json").write_text(json.dumps([*"abcde"]))
    options = [*SIZES, "--crops-per-image", "10", "--class-names", str(tmp_path / "names.json"), "--processes", "2"]
    convert_tokens.main([str(jsonl), str(tmp_path / "a.tokens"), *options])
    assert "a.tokens: 50 samples, " in capsys.readouterr().out
    meta = TokenStore(tmp_path / "a.tokens").meta
    assert (meta.num_samples, meta.crops_per_image, meta.class_names, meta.grid_size) == (50, 10, [*"abcde"], 4)
    convert_tokens.main([str(tmp_path / "a.tokens"), str(tmp_path / "back.jsonl")])
    assert (tmp_path / "back.jsonl").read_bytes() == jsonl.read_bytes()
    convert_tokens.main([str(jsonl), str(tmp_path / "a.tokens"), *options])
    assert "is already the conversion of" in capsys.readouterr().out


def test_bad_lines(jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    jsonl.write_bytes(jsonl.read_bytes() + b"\n")
    arguments = [str(jsonl), str(tmp_path / "a.tokens"), *SIZES]
    with pytest.raises(InputError, match="line 51: empty line"):
        convert_tokens.main(arguments)
    convert_tokens.main([*arguments, "--max-bad-fraction", "0.1"])
    assert "left out 1 bad lines: line 51: empty line" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        convert_tokens.main([*arguments, "--max-bad-fraction", "0.1", "--crops-per-image", "5"])


def test_wrong_names(jsonl: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a \.jsonl and a \.tokens"):
        convert_tokens.main([str(jsonl), str(tmp_path / "a.npz")])
    with pytest.raises(InputError, match="no such file"):
        convert_tokens.main([str(tmp_path / "b.jsonl"), str(tmp_path / "a.tokens")])
    convert_tokens.main([str(jsonl), str(tmp_path / "a.tokens"), *SIZES])
    with pytest.raises(InputError, match=r"a\.tokens: .*crops_per_image: found 1, expected 5;"):
        convert_tokens.main([str(jsonl), str(tmp_path / "a.tokens"), *SIZES, "--crops-per-image", "5"])
    with pytest.raises(InputError, match=r"a\.tokens: .*image_seq_len: found 16, expected 8;"):
        convert_tokens.main([str(jsonl), str(tmp_path / "a.tokens"), *SIZES, "--image-seq-len", "8"])
    convert_tokens.main([str(tmp_path / "a.tokens"), str(jsonl)])  # is that already
    jsonl.write_bytes(jsonl.read_bytes()[: -len(jsonl.read_bytes().splitlines(keepends=True)[-1])])
    with pytest.raises(InputError, match=r"a\.tokens: exists and is not made from .*codes\.jsonl as it is now"):
        convert_tokens.main([str(jsonl), str(tmp_path / "a.tokens"), *SIZES])
    with pytest.raises(InputError, match=r"codes\.jsonl: exists and is not .*a\.tokens as jsonl"):
        convert_tokens.main([str(tmp_path / "a.tokens"), str(jsonl)])
