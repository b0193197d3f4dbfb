"""Reports of the evaluator: printed lines and a JSON file of the form of `utils.files.provenance`:

{"provenance": {files, weights, settings, versions}, "warnings": [...], "metrics": {"fid": ...}}
"""

import glob
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.features import Extractor
from evaluation.inputs import Npz
from evaluation.metrics import classes_per_split
from utils.errors import InputError
from utils.files.hashing import file_sha256
from utils.files.json_file import read_json
from utils.files.provenance import write_record
from utils.run.run_environment import source_hash

USUAL_DISTANCE = "tf-fp16"  # of precision and recall, as in guided-diffusion
PUBLISHED_N = 50_000  # samples of published numbers
LEAST_SHARE_OF_CLASSES = 0.9  # in a split of the Inception Score, of those in random order
# The first five are the lines of guided-diffusion's evaluator.
TITLES = {
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
    "kid": "KID",
    "kid_std": "KID, standard deviation of subsets",
    "frechet_distance": "Frechet distance ({encoder})",
    "kernel_distance": "Kernel distance ({encoder})",
    "kernel_distance_std": "Kernel distance ({encoder}), standard deviation of subsets",
}


def new_report(reference: Npz, samples: Npz, extractor: Extractor, settings: dict[str, str]) -> dict[str, Any]:
    """The report before any feature is computed; `settings`: backend, device and possibly distance."""
    return {
        "provenance": {
            **settings,
            "reference": _describe_file(reference),
            "samples": _describe_file(samples),
            **_describe_extractor(extractor),
        },
        "warnings": _warnings(reference, samples, extractor, settings["backend"]),
    }


def feature_provenance(npz: Npz, extractor: Extractor, settings: dict[str, str]) -> dict[str, Any]:
    """Everything that the features of a file depend on."""
    settings = {key: settings[key] for key in ("backend", "device")}
    return {**settings, "images": npz.sha256, **_describe_extractor(extractor)}


def _describe_extractor(extractor: Extractor) -> dict[str, Any]:
    return {
        "weights": {"file": extractor.weights_name, "sha256": extractor.weights_sha256},
        "versions": {
            "code": source_hash(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "numpy", *extractor.packages)},
        },
    }


def file_label(provenance: dict[str, Any]) -> str:
    """The back end in names of files; of a timm model with its name and the hash of its weights."""
    kind, _, model = provenance["backend"].partition(":")
    return f"{kind}-{model}-{provenance['weights']['sha256'][:8]}" if model else kind


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
    if backend != "inception" and n_samples != n_reference:
        warnings.append(f"N differs, {n_reference} and {n_samples}; this distance is comparable at equal N only")
    for title, opened in (("reference", reference), ("samples", samples)):
        if opened.statistics is None and len(opened.images) < extractor.pool_dim:
            n, dim = len(opened.images), extractor.pool_dim
            warnings.append(f"{title}: N = {n} is less than the {dim} features; their covariance is singular")
    if backend == "inception" and samples.labels is not None:
        in_order = classes_per_split(samples.labels)
        shuffled = classes_per_split(np.random.default_rng(0).permutation(samples.labels))
        if in_order < LEAST_SHARE_OF_CLASSES * shuffled:
            warnings.append(
                f"the samples are sorted by class (arr_1): a split of the Inception Score has about {in_order:.4g} "
                f"classes, {shuffled:.4g} in random order, so the score is too low; shuffle the file"
            )
    sizes = ["x".join(str(edge) for edge in opened.images.shape[1:3]) for opened in (reference, samples)]
    if sizes[0] != sizes[1]:
        warnings.append(f"the reference has images of {sizes[0]} pixels, the samples of {sizes[1]}")
    return warnings


def print_files(report: dict[str, Any]) -> None:
    provenance = report["provenance"]
    for title in ("reference", "samples"):
        entry = provenance[title]
        height, width = entry["image_size"]
        statistics = ", stored statistics" if entry["stored_statistics"] else ""
        print(f"{title}: N = {entry['images']} of {height}x{width}{statistics} ({entry['file']})")
    print(f"weights: {provenance['weights']['file']}, sha256 {provenance['weights']['sha256']}", flush=True)
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def print_metrics(report: dict[str, Any]) -> None:
    if "distance" in report["provenance"]:
        print(f"distances of precision and recall: {report['provenance']['distance']}")
    for name, value in report["metrics"].items():
        print(f"{TITLES[name].format(encoder=_encoder_title(report))}: {value}")


def _encoder_title(report: dict[str, Any]) -> str:
    kind, _, model = report["provenance"]["backend"].partition(":")
    return model or ("EfficientNet-Lite0" if kind == "efficientnet_lite0" else kind)


def names_in_log(report: dict[str, Any]) -> dict[str, float]:
    """The metrics by name in the log of a run; names include the timm model, since a run may have scores of several."""
    model = report["provenance"]["backend"].partition(":")[2]
    return {f"{name}_{model}" if model else name: value for name, value in report["metrics"].items()}


def print_comparison(report: dict[str, Any]) -> None:
    """Print the report of `Evaluator.compare`."""
    provenance, metrics = report["provenance"], report["metrics"]
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    title = TITLES["fid" if provenance["backend"] == "inception" else "frechet_distance"]
    title = title.format(encoder=_encoder_title(report))
    for name in ("a", "b"):
        print(f"{name.upper()}: {title} {metrics[name]} (N = {provenance[name]['images']}, {provenance[name]['file']})")
    interval = f"95 % interval {metrics['low']:+.4g} to {metrics['high']:+.4g}"
    relative = 100 * metrics["difference"] / metrics["a"]
    print(f"B - A: {metrics['difference']:+.4g} ({relative:+.2f} %), {interval}")
    print(report["scope"])


def write_comparison(report: dict[str, Any], a: Path, b: Path) -> Path:
    """Write `<a>.compared_with_<b>.<backend>.json`."""
    path = a.with_suffix(f".compared_with_{b.stem}.{file_label(report['provenance'])}.json")
    figures = {key: value for key, value in report.items() if key != "provenance"}
    write_record(a, report["provenance"], record=path, figures=figures)
    return path


def write_report(report: dict[str, Any], samples: Path) -> Path:
    """Write `<samples>.<backend>.json`, or `<samples>.<backend>-<distance>.json` for a distance other than the usual.

    An existing report of the same samples with a different reference is kept, and the reference is added to the name:
    `<samples>.<reference>.<backend>.json`. Raises InputError if a file of that name is not a report.
    """
    provenance = report["provenance"]
    name = Path(provenance["reference"]["file"]).stem
    distance = provenance.get("distance", USUAL_DISTANCE)
    backend = file_label(provenance) if distance == USUAL_DISTANCE else f"{file_label(provenance)}-{distance}"
    for infix in ("", f".{name}", f".{name}-{provenance['reference']['sha256'][:8]}"):
        path = samples.with_suffix(f"{infix}.{backend}.json")
        if not path.exists() or not _has_other_reference(path, report):
            break
    write_record(
        samples, provenance, record=path, figures={key: value for key, value in report.items() if key != "provenance"}
    )
    return path


def find_same(samples: Path, report: dict[str, Any]) -> dict[str, Any] | None:
    """The complete report of an earlier evaluation with the same provenance."""
    for path in _paths_of_reports(samples, file_label(report["provenance"]) + "*"):
        found = _read_report(path)
        if found is not None and found["provenance"] == report["provenance"]:
            return found
    return None


def find_report(samples: Path, reference: Path, backend: str) -> dict[str, Any]:
    """The report of the two files in their present state; raises InputError if there is none."""
    samples_sha256 = file_sha256(samples, progress=True)
    reference_sha256 = file_sha256(reference, progress=True)
    for path in _paths_of_reports(samples, backend):
        report = _read_report(path)
        if report is not None and _hashes(report) == (samples_sha256, reference_sha256):
            return report
    raise InputError(f"{samples}: found no report of it with {reference} for the current files; run the evaluator")


def _paths_of_reports(samples: Path, backend: str) -> list[Path]:
    """Files with the name of a report, which may be of other samples or no reports."""
    return sorted(samples.parent.glob(f"{glob.escape(samples.stem)}*.{backend}.json"))


def _read_report(path: Path) -> dict[str, Any] | None:
    """None if it is not a report."""
    content = read_json(path)
    if not isinstance(content, dict):
        return None
    if "provenance" not in content:  # a flat report, of an earlier version
        results = {key: content.pop(key) for key in ("warnings", "metrics") if key in content}
        content = {"provenance": content, **results}
    try:
        _hashes(content)
    except (KeyError, TypeError):
        return None
    return content


def _has_other_reference(path: Path, report: dict[str, Any]) -> bool:
    """Whether the report at `path` is of the same samples and a different reference."""
    found = _read_report(path)
    if found is None:
        raise InputError(f"{path}: found another file, expected a report; delete or rename it")
    found_samples, found_reference = _hashes(found)
    samples, reference = _hashes(report)
    return found_samples == samples and found_reference != reference


def _hashes(report: dict[str, Any]) -> tuple[str, str]:
    """sha256 of samples and reference."""
    provenance = report["provenance"]
    return provenance["samples"]["sha256"], provenance["reference"]["sha256"]
