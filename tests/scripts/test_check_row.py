"""Rows of published numbers: the shipped ones, and the way from a row to its verdict on made-up weights."""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from evaluation.published_results import Row, RowFile
from modeling.rear import ReAR
from scripts import check_row
from scripts.download import FILES
from tests.evaluation.made_up import blocky_images
from tests.processes import ROOT
from utils.config import flat, load_config, save_config
from utils.errors import InputError
from utils.files.hashing import file_sha256
from utils.files.weights import save_weights

SHIPPED = RowFile(ROOT / "configs/published_results.yaml").rows
WriteRows = Callable[..., Path]


@pytest.fixture(scope="module")
def content(tiny_config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a file of rows with one row, tiny, of made-up weights."""
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
        "sha256": file_sha256(folder / "model.safetensors"),
        "get": "bash make_up.sh",
        "num_images": 20,
        "guidance_scale": 2.0,
        "guidance_scale_pow": 1.0,
        "overrides": ["model.generator.randomize_temperature=0.9"],
        "expected": {"frechet_distance": 1.0},
        "tolerance": "close",
        "published": "nowhere",
    }
    return {
        "reference": {"file": str(folder / "reference.npz"), "get": "bash draw.sh"},
        "tolerances": {"close": {"frechet_distance": {"relative": 1e-4, "reason": "the same images"}}},
        "rows": {"tiny": row},
    }


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


def test_a_wrong_row_fails_and_the_right_one_passes(
    write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = tmp_path / "samples.npz"
    done = rear_test(write_rows())
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "samples.verdict.json").read_text())
    number = found["numbers"]["frechet_distance"]
    assert number == {"found": number["found"], "expected": 1.0, "tolerance": 1e-4, "right": False}
    assert done.stdout.splitlines()[-2] == "tiny: FAIL: Frechet distance (EfficientNet-Lite0)"
    cells = f"| 1 | {number['found']:.6g} | {number['found'] - 1:+.4g} | 0.0001 | FAIL |"
    assert cells in done.stdout
    text = (tmp_path / "samples.verdict.md").read_text()
    assert cells in text
    for fact in ("num_fid_samples 20, seed 7", "guidance_scale 2.0", "device cpu", "torch ", "the same images"):
        assert fact in text
    row = yaml.safe_load((tmp_path / "rows.yaml").read_text())["rows"]["tiny"]
    assert found["weights"] == {"file": row["checkpoint"], "sha256": row["sha256"]}

    rows = write_rows(expected={"frechet_distance": round(number["found"], 4)})
    done = rear_test(rows)  # the samples and their score are there
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2] == "tiny: PASS"

    config = tmp_path / "other.yaml"
    config.write_text(Path(row["config"]).read_text().replace("tokenizer.safetensors", "another.safetensors"))
    for values, said in (
        ({"num_images": 37}, "sampling.num_fid_samples=20, not 37"),
        ({"guidance_scale": 3}, "model.generator.guidance_scale=2.0, not 3.0"),
        ({"config": str(config)}, r"experiment.tokenizer_checkpoint=\S*/tokenizer\.\w+, not \S*/another\.\w+"),
    ):
        rows = write_rows(expected={"frechet_distance": number["found"]}, **values)
        with pytest.raises(SystemExit):
            check(monkeypatch, "tiny", "--rows", rows, "--samples", samples)
        printed = capsys.readouterr().out
        assert re.search(rf"tiny: no verdict: the samples are not those of the row \({said}\)\n", printed)
        assert "PASS" not in printed
        found = json.loads((tmp_path / "samples.verdict.json").read_text())
        assert found["numbers"]["frechet_distance"]["right"] is None
    assert "PASS" not in (tmp_path / "samples.verdict.md").read_text()

    other = tmp_path / "model.safetensors"
    other.write_bytes(Path(row["checkpoint"]).read_bytes())
    with pytest.raises(InputError, match=r"samples\.npz: made from the weights .*, expected .*model\.safetensors"):
        check(monkeypatch, "tiny", "--rows", rows, "--samples", samples, "--checkpoint", other)
    samples.write_bytes(samples.read_bytes() + b"\n")
    with pytest.raises(InputError, match=r"samples\.npz: found no report of it with"):
        check(monkeypatch, "tiny", "--rows", rows, "--samples", samples)


def test_what_a_row_needs_is_told_before_it_is_sampled(
    write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = tmp_path / "absent.bin"
    rows = write_rows(checkpoint=str(absent))
    with pytest.raises(InputError, match=r"absent\.bin: sampling and scoring need more files, named above"):
        check(monkeypatch, "tiny", "--rows", rows, "--reference", "absent.npz")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"{absent} not there. To get: bash make_up.sh\nabsent.npz not there. To get: bash draw.sh\n"

    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    five = {"fid": 1.0, "inception_score": None, "sfid": None, "precision": None, "recall": None}
    file = yaml.safe_load(write_rows(expected=five, sha256="0" * 64).read_text())
    file["rows"]["tiny"]["expected"] = five
    file["tolerances"]["close"]["fid"] = {"absolute": 0.1, "reason": "none"}
    rows.write_text(yaml.safe_dump(file))
    with pytest.raises(InputError):
        check(monkeypatch, "tiny", "--rows", rows)
    told = capsys.readouterr().err
    assert re.search(rf"^{tmp_path}/hub/checkpoints holds neither .* To get: wget -P {tmp_path}/hub/checkpoints", told)
    weights = tmp_path / "hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"
    weights.parent.mkdir()
    weights.touch()
    with pytest.raises(InputError, match=r"model\.safetensors: found sha256 [0-9a-f]{64}, expected 0{64}; get it anew"):
        check(monkeypatch, "tiny", "--rows", rows)


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


def test_config_and_back_end_are_the_rows(tmp_path: Path) -> None:
    for name in ("CONFIG", "BACKEND"):
        done = rear_test(tmp_path / "rows.yaml", **{name: "another"})
        assert (done.returncode, done.stderr) == (
            1,
            "error: ROW=tiny names config and back end: leave CONFIG and BACKEND out\n",
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidence_scale": 1}, "row tiny: Object contains unknown field `guidence_scale`"),
        ({"get": None}, "row tiny: Object missing required field `get`"),
        ({"guidance_scale": "strong"}, r"row tiny: Expected `float`, got `str` - at `\$.guidance_scale`"),
        ({"sha256": "6726825d"}, r"row tiny: Expected `str` matching regex .* - at `\$.sha256`"),
        ({"expected": {"frechet_distance": None}}, "row tiny: expected: found no number that has a tolerance in close"),
        ({"expected": {"frechet_distance": "1,0"}}, "row tiny: expected.frechet_distance: Expected `float | null`"),
        ({"expected": {"fidd": 1.0}}, "row tiny: expected.fidd: unknown; expected inception_score, fid, sfid"),
        ({"expected": {"fid": 1.0}}, "row tiny: expected.inception_score: missing"),
        ({"tolerance": "wide"}, "row tiny: tolerance=wide: expected one of close"),
        ({"config": "absent.yaml"}, "row tiny: config=absent.yaml: no such file"),
        ({"overrides": ["sampling.sead=1"]}, "row tiny: command line: unknown key 'sampling.sead'"),
    ],
)
def test_a_bad_row_is_told_by_name_and_key(
    write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"rows\.yaml: {message}".replace("|", r"\|")):
        check(monkeypatch, "tiny", "--rows", write_rows(**values))


def test_a_bad_file_of_rows_is_one_line(write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"rows\.yaml: found no row rear_x, expected one of tiny$"):
        check(monkeypatch, "rear_x", "--rows", write_rows())
    text = (tmp_path / "rows.yaml").read_text()
    for broken, message in (
        (text.replace("relative:", "relativ:"), "tolerances.close.frechet_distance: Object contains unknown field"),
        (text + "rows: {}\n", "found duplicate key rows"),
        ("- tiny\n", "Expected `object`, got `array`"),
    ):
        (tmp_path / "rows.yaml").write_text(broken)
        with pytest.raises(InputError, match=rf"rows\.yaml: {message}"):
            check(monkeypatch, "tiny", "--rows", tmp_path / "rows.yaml")
    with pytest.raises(InputError, match=r"absent\.yaml: .*No such file"):
        check(monkeypatch, "tiny", "--rows", tmp_path / "absent.yaml")


def test_each_number_is_judged_by_its_tolerance() -> None:
    rows = RowFile(ROOT / "configs/published_results.yaml")
    found = {"inception_score": 280.0, "fid": 1.99, "sfid": 6.0, "precision": 0.829, "recall": 0.605}
    judged = rows.judge(rows["rar_b"], found)
    assert [*judged] == ["inception_score", "fid", "sfid", "precision", "recall"]
    assert [number.right for number in judged.values()] == [False, True, None, True, False]
    assert judged["fid"].tolerance == pytest.approx(0.026 * 1.95)
    assert check_row.verdict_of("rar_b", judged, []) == "rar_b: FAIL: Inception Score, Recall"
    assert "| sFID | not published | 6 | - | - | - |" in check_row.table_of(judged)
    plain = rows.judge(rows["ar_l"], found | {"fid": 3.1})
    assert [number.right for number in plain.values()] == [None, True, None, None, None]
    assert check_row.verdict_of("ar_l", plain, []) == "ar_l: PASS"


def test_scores_by_other_features_get_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    row = SHIPPED["rear_b"]
    config = load_config(["experiment.output_dir=unused", *row.arguments("weights")])
    save_config(config, tmp_path / "samples.yaml")
    made_from = dict(flat({"model": asdict(config.model), "sampling": asdict(config.sampling)}))
    for sha256, told in (("6726825d" * 8, []), ("0" * 64, ["features by weights of sha256 00000000, not 6726825d"])):
        facts = {"samples": made_from, "evaluation": {"provenance": {"weights": {"sha256": sha256}}}}
        assert check_row.other_settings(row, config, tmp_path / "samples.npz", facts) == told


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_row_has_a_config_and_a_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    row: Row = SHIPPED[name]
    config = load_config(["experiment.output_dir=unused", *row.arguments(row.checkpoint)])
    generator = config.model.generator
    assert (config.sampling.num_fid_samples, row.backend) == (50_000, "inception")
    assert (generator.guidance_scale, generator.guidance_scale_pow) == (row.guidance_scale, row.guidance_scale_pow)
    download = next((name for name, file in FILES.items() if file.target == row.checkpoint), None)
    if download:
        assert row.get == f"bash scripts_bash/download.sh tokenizer {download}"
        assert config.experiment.tokenizer_checkpoint == FILES["tokenizer"].target
    else:
        assert row.checkpoint.startswith("outputs/")
        assert row.get.startswith(("no weights of plain AR are published", "no weights are published"))


def test_the_readme_tells_the_numbers_of_the_rows() -> None:
    readme = (ROOT / "README.md").read_text()
    tables = {
        r"reAR-S .*FID, IS": [("rear_s", "fid"), ("rear_s", "inception_score")],
        r"reAR-B .*FID, IS; plain AR: FID": [("rear_b", "fid"), ("rear_b", "inception_score"), ("ar_b", "fid")],
        r"reAR-L .*FID, IS; plain AR: FID": [("rear_l", "fid"), ("rear_l", "inception_score"), ("ar_l", "fid")],
        r"\[RAR\].*-B, -L, -XL, -XXL .*FID": [(f"rar_{size}", "fid") for size in ("b", "l", "xl", "xxl")],
    }
    for title, numbers in tables.items():
        cells = re.search(rf"^\| {title} \|([^|]*)\|", readme, re.MULTILINE)
        assert cells is not None, title
        told = [float(number) for number in re.findall(r"[\d.]+", cells[1])]
        assert told == [SHIPPED[row].expected[metric] for row, metric in numbers]
