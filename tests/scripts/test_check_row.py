"""Published results: the shipped rows, and the way from a row to its verdict on made-up weights."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from modeling.rear import ReAR
from scripts import check_row, sample_imagenet_rear
from scripts.download import FILES
from tests.evaluation.made_up import blocky_images
from tests.processes import ROOT
from utils.config import load_config
from utils.errors import InputError
from utils.files.hashing import file_sha256
from utils.files.weights import load_state_dict, save_weights

SHIPPED = check_row.read(ROOT / "configs/published_results.yaml").rows
WriteRows = Callable[..., Path]


@pytest.fixture(scope="module")
def content(tiny_config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A file of rows with one row, tiny, of made-up weights."""
    folder = tmp_path_factory.mktemp("rows")
    torch.manual_seed(0)
    model = ReAR(load_config([f"config={tiny_config_file}", "experiment.output_dir=unused"]).model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_weights(model.state_dict(), folder / "model.safetensors")
    np.savez(folder / "reference.npz", arr_0=blocky_images(np.random.RandomState(0), 21, 16))
    row = {
        "config": str(tiny_config_file),
        "checkpoint": str(folder / "model.safetensors"),
        "get": "bash make_up.sh",
        "num_images": 20,
        "guidance_scale": 2.0,
        "guidance_scale_pow": 1.0,
        "overrides": ["model.generator.randomize_temperature=0.9"],
        "expected": {"frechet_distance": [1.0, 1e-3]},
        "published": "nowhere",
    }
    return {"reference": {"file": str(folder / "reference.npz"), "get": "bash draw.sh"}, "rows": {"tiny": row}}


@pytest.fixture
def write_rows(content: dict[str, Any], tmp_path: Path) -> WriteRows:
    """A function that writes the file with other values in the row tiny; None: without the key."""

    def write(**values: Any) -> Path:
        changed = copy.deepcopy(content)
        row = changed["rows"]["tiny"] | values
        changed["rows"]["tiny"] = {key: value for key, value in row.items() if value is not None}
        (tmp_path / "rows.yaml").write_text(yaml.safe_dump(changed))
        return tmp_path / "rows.yaml"

    return write


def rear_test(rows: Path, **variables: str) -> subprocess.CompletedProcess:
    """The bash script with the row tiny."""
    variables |= {"ROW": "tiny", "ROWS": str(rows), "OUTPUT_DIR": str(rows.parent / "samples"), "NUM_GPUS": "1"}
    variables |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "scripts_bash/rear_test.sh"), "sampling.seed=7"]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


def check(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["check_row.py", *map(str, arguments)])
    check_row.main()


@pytest.mark.slow
def test_a_wrong_row_fails_and_the_right_one_passes(
    write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = tmp_path / "samples.npz"
    done = rear_test(write_rows())
    assert done.returncode == 1, done.stderr
    result = json.loads((tmp_path / "samples.verdict.json").read_text())
    number = result["numbers"]["frechet_distance"]
    assert number == {"expected": 1.0, "found": number["found"], "tolerance": 1e-3, "verdict": "FAIL"}
    assert result["verdict"] == "FAIL"
    assert "\ntiny: FAIL\n" in done.stdout
    assert result["samples"]["provenance"]["sampling.seed"] == 7

    right = {"frechet_distance": [round(number["found"], 4), 1e-3]}
    done = rear_test(write_rows(expected=right))  # samples and score exist already
    assert done.returncode == 0, done.stderr
    assert "\ntiny: PASS\n" in done.stdout

    for values, difference in (
        ({"num_images": 37}, "sampling.num_fid_samples=20, not 37"),
        ({"guidance_scale": 3}, "model.generator.guidance_scale=2.0, not 3.0"),
    ):
        rows = write_rows(expected=right, **values)
        with pytest.raises(SystemExit, match="1"):
            check(monkeypatch, "tiny", "--rows", rows, "--samples", samples)
        assert re.search(rf"tiny: no verdict: .* \({difference}\)\n", capsys.readouterr().out)
        result = json.loads((tmp_path / "samples.verdict.json").read_text())
        assert result["numbers"]["frechet_distance"]["verdict"] is None

    samples.write_bytes(samples.read_bytes() + b"\n")
    with pytest.raises(InputError, match=r"samples\.npz: found no report"):
        check(monkeypatch, "tiny", "--rows", rows, "--samples", samples)


def test_missing_files_are_named_with_how_to_get_them(
    write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    absent = tmp_path / "absent.bin"
    rows = write_rows(checkpoint=str(absent), expected={"fid": [1.0, 0.1]})
    with pytest.raises(SystemExit) as stopped:
        check(monkeypatch, "tiny", "--rows", rows, "--reference", "absent.npz")
    lines = str(stopped.value).splitlines()
    assert lines[:2] == [
        f"error: {absent}: not found; to get it: bash make_up.sh",
        "error: absent.npz: not found; to get it: bash draw.sh",
    ]
    assert lines[2].startswith("error: Inception weights: ")
    assert f"wget -P {tmp_path}/hub/checkpoints https://" in lines[2]
    assert len(lines) == 3


def test_arguments_of_the_sampler(
    write_rows: WriteRows, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check(monkeypatch, "tiny", "--rows", write_rows())
    row = content["rows"]["tiny"]
    assert capsys.readouterr().out.splitlines() == [
        "efficientnet_lite0",
        content["reference"]["file"],
        f"config={row['config']}",
        f"experiment.generator_checkpoint={row['checkpoint']}",
        "sampling.num_fid_samples=20",
        "model.generator.guidance_scale=2.0",
        "model.generator.guidance_scale_pow=1.0",
        "model.generator.randomize_temperature=0.9",
    ]


def test_config_and_backend_are_those_of_the_row(tmp_path: Path) -> None:
    for name in ("CONFIG", "BACKEND"):
        done = rear_test(tmp_path / "rows.yaml", **{name: "another"})
        assert done.returncode == 1
        assert done.stderr.startswith("error: ROW=tiny")


@pytest.mark.parametrize(
    "values",
    [
        {"guidence_scale": 1},
        {"get": None},
        {"guidance_scale": "strong"},
        {"expected": {"fidd": [1.0, 0.1]}},
        {"expected": {"fid": [1.0]}},
        {"config": "absent.yaml"},
        {"overrides": ["sampling.sead=1"]},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_bad_row_is_an_input_error(
    write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    with pytest.raises(InputError):
        check(monkeypatch, "tiny", "--rows", write_rows(**values))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: &a [*a]", b"[" * 5000])
def test_what_is_no_file_of_rows(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"rows\.yaml: "):
        check_row.read(tmp_path / "rows.yaml")


def test_an_unknown_row_is_an_input_error(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="rear_x, expected one of tiny"):
        check(monkeypatch, "rear_x", "--rows", write_rows())


def test_each_number_is_judged_by_its_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_row, "other_settings", lambda row, config, samples, report: [])
    monkeypatch.setattr(check_row, "read_json", lambda path: {})
    metrics = {"inception_score": 280.0, "fid": 1.99, "sfid": 6.0, "precision": 0.829, "recall": 0.605}
    monkeypatch.setattr(check_row, "find_report", lambda samples, reference, backend: {"metrics": metrics})
    config = load_config(["experiment.output_dir=unused"])

    def verdicts(name: str) -> dict[str, str | None]:
        check_row.compare(name, SHIPPED[name], config, tmp_path / "samples.npz", "reference.npz")
        result = json.loads((tmp_path / "samples.verdict.json").read_text())
        return {"all": result["verdict"]} | {key: number["verdict"] for key, number in result["numbers"].items()}

    expected = {"fid": "PASS", "inception_score": "FAIL", "precision": "PASS", "recall": "FAIL"}
    assert verdicts("rar_b") == {"all": "FAIL"} | expected
    metrics["fid"] = 3.1
    assert verdicts("ar_l") == {"all": "PASS", "fid": "PASS", "inception_score": None}


def test_samples_of_another_origin_get_no_verdict(
    write_rows: WriteRows, content: dict[str, Any], tmp_path: Path
) -> None:
    row = check_row.read(write_rows(expected={"fid": [1.0, 0.1]})).rows["tiny"]
    row.checkpoint = str(shutil.copy(row.checkpoint, tmp_path / "model.safetensors"))
    arguments = [f"experiment.output_dir={tmp_path / 'samples'}", *row.arguments()]
    sample_imagenet_rear.main(load_config(arguments))
    samples = tmp_path / "samples.npz"

    def others(*overrides: str, features: str = "6726825d" * 8) -> list[str]:
        provenance = {"weights": {"sha256": features}, "samples": {"sha256": file_sha256(samples)}}
        config = load_config([*arguments, *overrides])
        return check_row.other_settings(row, config, samples, {"provenance": provenance})

    assert others() == []
    assert others(features="0" * 64) == ["features of weights with sha256 00000000, not 6726825d"]
    assert [line.partition("=")[0] for line in others("model.generator.order=random")] == ["model.generator.order"]
    whole = samples.read_bytes()
    with np.load(samples) as arrays:
        np.savez(samples, arr_0=255 - arrays["arr_0"], arr_1=arrays["arr_1"])  # foreign samples of the same sizes
    [line] = others()
    assert line.startswith("sha256 of samples.npz=")
    samples.write_bytes(whole)
    state = load_state_dict(Path(row.checkpoint))
    for overrides, key, source in (
        ((), "generator_checkpoint", Path(row.checkpoint)),
        ("experiment.tokenizer_checkpoint=", "tokenizer_checkpoint", tmp_path / "tokenizer.safetensors"),
    ):
        if key == "tokenizer_checkpoint":
            save_weights(state, Path(row.checkpoint))
            state = load_state_dict(Path(load_config(arguments).experiment.tokenizer_checkpoint))
            overrides = (f"experiment.tokenizer_checkpoint={source}",)
        name = next(name for name, value in state.items() if value.is_floating_point())
        save_weights({**state, name: state[name] + 0.1}, source)
        [line] = others(*overrides)
        assert line.startswith(f"sha256 of experiment.{key}=")
    record = json.loads((tmp_path / "samples.json").read_text())
    del record["files"]  # of an earlier version
    (tmp_path / "samples.json").write_text(json.dumps(record))
    assert any(line.startswith("sha256 of samples.npz=None, not ") for line in others())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_row_has_a_config_and_a_source(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    row = SHIPPED[name]
    config = load_config(["experiment.output_dir=unused", *row.arguments()])
    generator = config.model.generator
    assert (config.sampling.num_fid_samples, row.backend) == (50_000, "inception")
    assert (generator.guidance_scale, generator.guidance_scale_pow) == (row.guidance_scale, row.guidance_scale_pow)
    assert row.expected["fid"][1] == pytest.approx(
        row.expected["fid"][0] * (0.037 if row.checkpoint.startswith("outputs/") else 0.026), abs=1e-3
    )
    download = next((name for name, file in FILES.items() if file.target == row.checkpoint), None)
    if download:
        assert row.get == f"bash scripts_bash/download.sh tokenizer {download}"
        assert config.experiment.tokenizer_checkpoint == FILES["tokenizer"].target
    else:
        assert row.checkpoint.startswith("outputs/")
        assert row.get.startswith(("no weights of plain AR are published", "no weights are published"))


def test_the_readme_has_the_numbers_of_the_rows() -> None:
    readme = (ROOT / "README.md").read_text()
    tables = {
        r"FID, IS \(published\)": [
            (row, key) for row in ("rear_s", "rear_b", "rear_l") for key in ("fid", "inception_score")
        ],
        r"FID of the same model without the method \(published\)": [("ar_b", "fid"), ("ar_l", "fid")],
        r"\[RAR\].*-B, -L, -XL, -XXL .*FID": [(f"rar_{size}", "fid") for size in ("b", "l", "xl", "xxl")],
    }
    for title, numbers in tables.items():
        row = re.search(rf"^\| {title} \|(.*)$", readme, re.MULTILINE)
        assert row is not None, title
        cells = row[1] if "published" in title else row[1].partition("|")[0]
        found = [float(number) for number in re.findall(r"[\d.]+", cells)]
        assert found == [SHIPPED[row].expected[metric][0] for row, metric in numbers]
