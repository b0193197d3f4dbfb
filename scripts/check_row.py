"""Check a published result of configs/published_results.yaml: first its files, then its scores.

    ROW=rear_b bash scripts_bash/rear_test.sh    # calls this, samples, scores, and calls this again
    python scripts/check_row.py rear_b
    python scripts/check_row.py rear_b --samples outputs/row_rear_b.npz

The first form prints the backend of the evaluator, the reference and the arguments of the sampler, a line each; if a
file is missing, it prints how to get it and fails. The second form, for samples that the evaluator has scored, prints
expected and found numbers with PASS or FAIL, and writes them, with everything that they depend on, to
<SAMPLES>.verdict.json. Samples of different settings, such as fewer images, get no verdict. The exit status
is 0 for PASS only.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import msgspec
import torch
import yaml

from evaluation.inception import PUBLISHED_SHA256, find_cached_weights
from evaluation.report import TITLES, find_report
from modeling.loading import load_generator, load_tokenizer
from utils.config import ROOT, flat, load_config
from utils.console import markdown_table
from utils.errors import InputError, first_line, input_errors_exit
from utils.files.atomic import write_text
from utils.files.hub import SCHEME
from utils.files.json_file import read_json
from utils.files.provenance import provenance_in
from utils.files.text import read_text, user_path
from utils.files.weights import weights_sha256
from utils.run.run_environment import describe_environment
from utils.run.weights_path import find_generator_weights
from utils.schema import Config

# A row does not fix these keys of `sampling`; images_per_class is part of num_fid_samples.
NOT_COMPARED = {"seed", "per_gpu_batch_size", "save_png", "compile", "mixed_precision", "images_per_class"}
Metric = Literal["inception_score", "fid", "sfid", "precision", "recall", "frechet_distance"]
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


class Row(msgspec.Struct, forbid_unknown_fields=True):
    """
    Attributes:
        checkpoint: a file, or the folder of a run.
        get: how to get checkpoint and tokenizer.
        expected: published number and tolerance of each metric; None: not judged.
        published: where the numbers are from.
        overrides: further arguments of the sampler.
    """

    config: str
    checkpoint: str
    get: str
    num_images: int
    guidance_scale: float
    guidance_scale_pow: float
    expected: dict[Metric, tuple[float, float | None]]
    published: str
    overrides: list[str] = []

    @property
    def backend(self) -> str:
        return "efficientnet_lite0" if "frechet_distance" in self.expected else "inception"

    def arguments(self) -> list[str]:
        """Arguments of the sampler."""
        return [
            f"config={self.config}",
            f"experiment.generator_checkpoint={self.checkpoint}",
            f"sampling.num_fid_samples={self.num_images}",
            f"model.generator.guidance_scale={self.guidance_scale}",
            f"model.generator.guidance_scale_pow={self.guidance_scale_pow}",
            *self.overrides,
        ]


class Reference(msgspec.Struct, forbid_unknown_fields=True):
    file: str
    get: str


class Content(msgspec.Struct, forbid_unknown_fields=True):
    reference: Reference
    rows: dict[str, Row]


def read(path: Path) -> Content:
    """Raises InputError for an unknown key, or a missing or wrong value."""
    try:
        return msgspec.convert(yaml.safe_load(read_text(path)), Content)
    except (yaml.YAMLError, msgspec.ValidationError, RecursionError) as error:
        raise InputError(f"{path}: {first_line(error)}") from error


def missing_files(row: Row, config: Config, reference: Reference) -> list[str]:
    """A line for each missing file, with how to get it."""
    lines = []
    for file in (str(config.experiment.generator_checkpoint), str(config.experiment.tokenizer_checkpoint)):
        if not (file.startswith(SCHEME) or Path(file).exists()):
            lines.append(f"{file}: not found; to get it: {row.get}")
    if not Path(reference.file).exists():
        lines.append(f"{reference.file}: not found; to get it: {reference.get}")
    if row.backend == "inception":
        try:
            find_cached_weights()
        except InputError:
            folder = Path(torch.hub.get_dir()) / "checkpoints"
            lines.append(f"Inception weights: not found in {folder}; to get them: wget -P {folder} {INCEPTION_URL}")
    return lines


def other_settings(row: Row, config: Config, samples: Path, report: dict[str, Any]) -> list[str]:
    """Differences of the samples or their scores from the row, and of the samples from their record."""
    record = read_json(samples.with_suffix(".json"))
    tokenizer = load_tokenizer(config)
    weights, _ = find_generator_weights(config, tokenizer.sha256())
    sections = {"model": dataclasses.asdict(config.model), "sampling": dataclasses.asdict(config.sampling)}
    expected = {key: value for key, value in flat(sections) if key.removeprefix("sampling.") not in NOT_COMPARED}
    expected["sha256 of experiment.generator_checkpoint"] = weights_sha256(load_generator(weights.path, config.model))
    expected["sha256 of experiment.tokenizer_checkpoint"] = weights_sha256(tokenizer)
    expected[f"sha256 of {samples.name}"] = report["provenance"]["samples"]["sha256"]
    found = dict(provenance_in(record) or {})
    found[f"sha256 of {samples.name}"] = record.get("files", {}).get(samples.name, {}).get("sha256")
    other = [f"{key}={found.get(key)}, not {value}" for key, value in expected.items() if found.get(key) != value]
    features = report["provenance"]["weights"]["sha256"]
    if row.backend == "inception" and not features.startswith(PUBLISHED_SHA256):
        other.append(f"features of weights with sha256 {features[:8]}, not {PUBLISHED_SHA256}")
    return other


def compare(name: str, row: Row, config: Config, samples: Path, reference: str) -> bool:
    """Print the verdict on samples and write it next to them; returns whether it is PASS."""
    report = find_report(samples, Path(reference), row.backend)
    other = other_settings(row, config, samples, report)
    numbers: dict[str, dict[str, Any]] = {}
    for metric, (expected, tolerance) in row.expected.items():
        found, verdict = report["metrics"][metric], None
        if tolerance is not None and not other:
            verdict = "PASS" if abs(found - expected) <= tolerance else "FAIL"
        numbers[metric] = {"expected": expected, "found": found, "tolerance": tolerance, "verdict": verdict}
    verdicts = {number["verdict"] for number in numbers.values()}
    verdict = "FAIL" if "FAIL" in verdicts else "PASS" if "PASS" in verdicts else "no verdict"
    if other:
        verdict += f": the samples differ from the row ({'; '.join(other)})"
    result = {
        "row": name,
        "verdict": verdict,
        "numbers": numbers,
        "published": row.published,
        "samples": read_json(samples.with_suffix(".json")),
        "evaluation": report,
        "environment": describe_environment().splitlines(),
    }
    path = samples.with_suffix(".verdict.json")
    write_text(path, json.dumps(result, indent=2) + "\n")
    lines = [[TITLES[metric], *(str(value) for value in number.values())] for metric, number in numbers.items()]
    print(markdown_table(["number", "expected", "found", "tolerance", "verdict"], lines))
    print(f"\n{name}: {verdict}\nreport: {path}")
    return verdict == "PASS"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", help="name of a row")
    parser.add_argument("--samples", type=user_path, metavar="NPZ", help="samples that the evaluator has scored")
    parser.add_argument(
        "--rows", type=user_path, default=ROOT / "configs/published_results.yaml", help="the file of rows"
    )
    parser.add_argument("--checkpoint", help="instead of the row's, if it is stored elsewhere")
    parser.add_argument("--reference", help="instead of the file's, if it is stored elsewhere")
    args = parser.parse_args()
    content = read(args.rows)
    if args.row not in content.rows:
        raise InputError(f"{args.rows}: found no row {args.row}, expected one of {', '.join(content.rows)}")
    row, reference = content.rows[args.row], content.reference
    row.checkpoint = args.checkpoint or row.checkpoint
    reference.file = args.reference or reference.file
    config = load_config(["experiment.output_dir=unused", *row.arguments()])
    if args.samples is not None:
        raise SystemExit(0 if compare(args.row, row, config, args.samples, reference.file) else 1)
    if missing := missing_files(row, config, reference):
        raise SystemExit("\n".join(f"error: {line}" for line in missing))
    print("\n".join([row.backend, reference.file, *row.arguments()]))


if __name__ == "__main__":
    with input_errors_exit():
        main()
