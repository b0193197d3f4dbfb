"""What an evaluation reports: the printed lines, the warnings and the JSON file."""

import glob
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from evaluation.features import Extractor
from evaluation.inputs import Npz
from utils.errors import InputError
from utils.files.atomic import write_text
from utils.files.hashing import file_sha256
from utils.files.json_file import read_json
from utils.run.run_environment import source_hash

USUAL_DISTANCE = "tf-fp16"  # of precision and recall, as in the original
PUBLISHED_N = 50_000  # samples behind published numbers
# The first five are the lines of guided-diffusion's evaluator.
TITLES = {
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
    "frechet_distance": "Frechet distance (EfficientNet-Lite0)",
}


def describe(reference: Npz, samples: Npz, extractor: Extractor, backend: str) -> dict[str, Any]:
    """What is known of the files and the weights before any feature is computed."""
    return {
        "reference": _describe_file(reference),
        "samples": _describe_file(samples),
        "weights": {"file": extractor.weights_name, "sha256": extractor.weights_sha256},
        "versions": {
            "code": source_hash(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "numpy", *extractor.packages)},
        },
        "warnings": _warnings(reference, samples, extractor, backend),
    }


def _describe_file(opened: Npz) -> dict[str, Any]:
    return {
        "file": opened.images.path.name,
        "sha256": opened.sha256,
        "images": len(opened.images),
        "image_size": list(opened.images.shape[1:3]),  # height, width in pixels
        "stored_statistics": opened.statistics is not None,
    }


def _warnings(reference: Npz, samples: Npz, extractor: Extractor, backend: str) -> list[str]:
    warnings = [extractor.caveat] if extractor.caveat else []
    n_reference, n_samples = len(reference.images), len(samples.images)
    if backend == "inception" and n_samples < PUBLISHED_N:
        warnings.append(f"N = {n_samples} samples, published numbers use {PUBLISHED_N}; fewer give a larger FID")
    if backend == "efficientnet_lite0" and n_samples != n_reference:
        warnings.append(f"N differs, {n_reference} and {n_samples}; this distance is comparable at equal N only")
    for title, opened in (("reference", reference), ("samples", samples)):
        if opened.statistics is None and len(opened.images) < extractor.pool_dim:
            n, dim = len(opened.images), extractor.pool_dim
            warnings.append(f"{title}: N = {n} is less than the {dim} features; their covariance is singular")
    sizes = ["x".join(str(edge) for edge in opened.images.shape[1:3]) for opened in (reference, samples)]
    if sizes[0] != sizes[1]:
        warnings.append(f"the reference has images of {sizes[0]} pixels, the samples of {sizes[1]}")
    return warnings


def print_description(report: dict[str, Any]) -> None:
    for title in ("reference", "samples"):
        entry = report[title]
        height, width = entry["image_size"]
        statistics = ", stored statistics" if entry["stored_statistics"] else ""
        print(f"{title}: N = {entry['images']} of {height}x{width}{statistics} ({entry['file']})")
    print(f"weights: {report['weights']['file']}, sha256 {report['weights']['sha256']}", flush=True)
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def print_metrics(report: dict[str, Any]) -> None:
    if "distance" in report:
        print(f"distances of precision and recall: {report['distance']}")
    for name, value in report["metrics"].items():
        print(f"{TITLES[name]}: {value}")


def write_report(report: dict[str, Any], samples: Path) -> Path:
    """Write `<samples>.<backend>.json` beside the samples file, complete or not at all; with another distance than the
    usual one `<samples>.<backend>-<distance>.json`.

    If that is the report of the same samples and another reference, it stays, and this one gets the name of its
    reference: `<samples>.<reference>.<backend>.json`.

    Raises:
        InputError: a file of that name that is no report.
    """
    reference, name = report["reference"], Path(report["reference"]["file"]).stem
    distance = report.get("distance", USUAL_DISTANCE)
    backend = report["backend"] if distance == USUAL_DISTANCE else f"{report['backend']}-{distance}"
    for part in ("", f".{name}", f".{name}-{reference['sha256'][:8]}"):
        path = samples.with_suffix(f"{part}.{backend}.json")
        if not path.exists() or not _is_of_other_pair(path, report):
            break
    write_text(path, json.dumps(report, indent=2) + "\n")
    return path


def find_same(samples: Path, described: dict[str, Any]) -> dict[str, Any] | None:
    """The report that an earlier evaluation of the same files left, with the same weights, code and versions."""
    for path in sorted(samples.parent.glob(f"{glob.escape(samples.stem)}*.{described['backend']}*.json")):
        report = read_json(path)
        if isinstance(report, dict) and all(report.get(key) == value for key, value in described.items()):
            return report
    return None


def find_report(samples: Path, reference: Path, backend: str) -> dict[str, Any]:
    """The report of a pair of files as they are now.

    Raises:
        InputError: there is none.
    """
    now = file_sha256(samples, progress=True), file_sha256(reference, progress=True)
    for path in sorted(samples.parent.glob(f"{glob.escape(samples.stem)}*.{backend}.json")):
        report = read_json(path)  # by its name it may be of other samples, or no report
        if _pair(report) == now:
            return report
    raise InputError(f"{samples}: found no report of it with {reference}, both as they are now; run the evaluator")


def _is_of_other_pair(path: Path, report: dict[str, Any]) -> bool:
    """Whether a report tells of the same samples and another reference; one of older samples has had its time."""
    there, ours = _pair(read_json(path)), _pair(report)
    if there is None or ours is None:
        raise InputError(f"{path}: exists and is no report; delete or rename it")
    return there[0] == ours[0] and there[1] != ours[1]


def _pair(report: Any) -> tuple[str, str] | None:
    """sha256 of samples and reference; None: it is no report."""
    try:
        return report["samples"]["sha256"], report["reference"]["sha256"]
    except (KeyError, TypeError):
        return None
