"""A report for each pair of samples and reference."""

import json
from pathlib import Path

import pytest

from evaluation.report import find_report, write_report
from utils.errors import InputError
from utils.files.hashing import file_sha256


def report_of(reference: Path, samples: Path, fid: float) -> dict:
    sides = {
        title: {"file": path.name, "sha256": file_sha256(path)}
        for title, path in (("reference", reference), ("samples", samples))
    }
    return {"provenance": {"backend": "inception", **sides}, "metrics": {"fid": fid}}


def test_a_second_reference_leaves_the_first_report(tmp_path: Path) -> None:
    samples, a, b, other_b = (tmp_path / name for name in ("s.npz", "a.npz", "b.npz", "x/b.npz"))
    other_b.parent.mkdir()
    for path in (samples, a, b, other_b):
        path.write_text(str(path))
    names = [write_report(report_of(reference, samples, i), samples).name for i, reference in enumerate((a, b, a))]
    assert names == ["s.inception.json", "s.b.inception.json", "s.inception.json"]
    third = write_report(report_of(other_b, samples, 3), samples)
    assert third.name == f"s.b-{file_sha256(other_b)[:8]}.inception.json"
    assert [find_report(samples, path, "inception")["metrics"]["fid"] for path in (a, b, other_b)] == [2, 1, 3]
    samples.write_text("new samples")
    assert write_report(report_of(b, samples, 4), samples).name == "s.inception.json"
    assert find_report(samples, b, "inception")["metrics"]["fid"] == 4  # s.b.inception.json is of the old samples
    a.write_text("another")
    with pytest.raises(InputError, match=r"s\.npz: found no report of it with .*a\.npz for the current files"):
        find_report(samples, a, "inception")
    (tmp_path / "s.inception.json").write_text(json.dumps([]))
    with pytest.raises(InputError, match="expected a report"):
        write_report(report_of(b, samples, 5), samples)


def test_reports_of_names_with_a_common_prefix_are_distinguished(tmp_path: Path) -> None:
    reference, samples, other = (tmp_path / name for name in ("reference.npz", "s.npz", "s-seed7.npz"))
    for path in (reference, samples, other):
        path.write_text(str(path))
    (tmp_path / "s-a.inception.json").write_text("[]")
    write_report(report_of(reference, other, 7), other)
    with pytest.raises(InputError, match=r"s\.npz: found no report of it"):
        find_report(samples, reference, "inception")
    write_report(report_of(reference, samples, 1), samples)
    assert [find_report(path, reference, "inception")["metrics"]["fid"] for path in (samples, other)] == [1, 7]


def test_a_flat_report_of_an_earlier_version(tmp_path: Path) -> None:
    reference, samples = tmp_path / "reference.npz", tmp_path / "s.npz"
    for path in (reference, samples):
        path.write_text(str(path))
    report = report_of(reference, samples, 7)
    (tmp_path / "s.inception.json").write_text(json.dumps({**report.pop("provenance"), **report}))
    assert find_report(samples, reference, "inception")["metrics"]["fid"] == 7
    assert write_report(report_of(reference, samples, 8), samples).name == "s.inception.json"
    assert find_report(samples, reference, "inception")["metrics"]["fid"] == 8
