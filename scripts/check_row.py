"""Check a published result of configs/published_results.yaml: first its inputs, then its scores.

    ROW=rear_b bash scripts_bash/rear_test.sh    # calls this, samples, scores, and calls this again
    python scripts/check_row.py rear_b
    python scripts/check_row.py rear_b --samples outputs/row_rear_b.npz

The first form prints the back end of the evaluator, the reference and the arguments of the sampler, a line each. A file
that is not there is an error that says how to get it, as is a checkpoint of another sha256 than the row's. The second,
of samples that the evaluator has scored, prints expected and found numbers and the verdict, and writes them to
<SAMPLES>.verdict.md and, with all that the numbers depend on, <SAMPLES>.verdict.json. Its exit status is 0 for PASS
alone: samples of other settings than the row's, such as fewer images, get no verdict.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import torch

from evaluation.inception import PUBLISHED_SHA256, find_cached_weights
from evaluation.published_results import Judged, Row, RowFile
from evaluation.report import TITLES, find_report
from utils.config import ROOT, flat, load_config, read_yaml
from utils.console import markdown_table
from utils.errors import InputError, input_errors_exit
from utils.files.atomic import write_text
from utils.files.hashing import file_sha256
from utils.files.hub import SCHEME
from utils.files.json_file import read_json
from utils.run.run_environment import describe_environment
from utils.run.weights_path import find_weights
from utils.schema import Config

TOKENIZER = "experiment.tokenizer_checkpoint"
# Of model and sampling, what a row leaves open, and images_per_class, which is told as the number of images.
OPEN = {"seed", "per_gpu_batch_size", "save_png", "compile", "mixed_precision", "images_per_class"}
SHOWN = (
    *("sampling.num_fid_samples", "sampling.seed", "sampling.mixed_precision", "device"),
    *("model.generator.guidance_scale", "model.generator.guidance_scale_pow", "model.generator.randomize_temperature"),
)
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
VERDICTS = {True: "PASS", False: "FAIL", None: "-"}


def check_files(row: Row, config: Config, reference: str, get_reference: str) -> None:
    """
    Raises:
        InputError: a file is not there, after a line that says how to get it; or it is another one than the row's.
    """
    checkpoint, tokenizer = str(config.experiment.generator_checkpoint), config.experiment.tokenizer_checkpoint
    lines = []
    for files, get in (((checkpoint, tokenizer), row.get), ((reference,), get_reference)):
        if absent := [file for file in files if not (file.startswith(SCHEME) or Path(file).exists())]:
            lines.append(f"{' and '.join(absent)} not there. To get: {get}")
    if row.backend == "inception":
        try:
            find_cached_weights()
        except InputError as error:
            what = str(error).removeprefix("--inception: missing, and ")
            lines.append(f"{what}. To get: wget -P {torch.hub.get_dir()}/checkpoints {INCEPTION_URL}")
    if lines:
        print("\n".join(lines), file=sys.stderr)
        raise InputError(f"{checkpoint}: sampling and scoring need more files, named above")
    if row.sha256 is not None:
        found = file_sha256(find_weights(checkpoint).path, progress=True)
        if found != row.sha256:
            raise InputError(f"{checkpoint}: found sha256 {found}, expected {row.sha256}; get it anew: {row.get}")


def facts_of(row: Row, config: Config, samples: Path, reference: str) -> dict[str, Any]:
    """All that the numbers depend on.

    Raises:
        InputError: samples that do not tell what they were made from, of other weights, or without a score.
    """
    record = read_json(samples.with_suffix(".json"))
    weights = find_weights(str(config.experiment.generator_checkpoint)).path
    if record.get("weights") != str(weights.resolve()):
        raise InputError(f"{samples}: made from the weights {record.get('weights')}, expected {weights}")
    return {
        "weights": {"file": str(weights), "sha256": file_sha256(weights, progress=True) if weights.is_file() else None},
        "samples": record["made_from"],
        "evaluation": find_report(samples, Path(reference), row.backend),
        "environment": describe_environment().splitlines(),
    }


def other_settings(row: Row, config: Config, samples: Path, facts: dict[str, Any]) -> list[str]:
    """In what samples, or their score, differ from those of the row."""
    sections = {"model": dataclasses.asdict(config.model), "sampling": dataclasses.asdict(config.sampling)}
    wanted = {key: value for key, value in flat(sections) if key.removeprefix("sampling.") not in OPEN}
    found = {TOKENIZER: read_yaml(samples.with_suffix(".yaml"))[TOKENIZER], **facts["samples"]}
    wanted[TOKENIZER] = config.experiment.tokenizer_checkpoint
    other = [f"{key}={found.get(key)}, not {value}" for key, value in wanted.items() if found.get(key) != value]
    features = facts["evaluation"]["weights"]["sha256"]
    if row.backend == "inception" and not features.startswith(PUBLISHED_SHA256):
        other.append(f"features by weights of sha256 {features[:8]}, not {PUBLISHED_SHA256}")
    return other


def verdict_of(name: str, judged: dict[str, Judged], other: list[str]) -> str:
    """A line that begins with the name, and PASS, FAIL or no verdict."""
    if other:
        return f"{name}: no verdict: the samples are not those of the row ({'; '.join(other)})"
    wrong = [TITLES[metric] for metric, number in judged.items() if number.right is False]
    return f"{name}: FAIL: {', '.join(wrong)}" if wrong else f"{name}: PASS"


def table_of(judged: dict[str, Judged]) -> str:
    lines = []
    for metric, number in judged.items():
        expected, difference, tolerance = "not published", "-", "-"
        if number.expected is not None:
            expected, difference = f"{number.expected:g}", f"{number.found - number.expected:+.4g}"
        if number.tolerance is not None:
            tolerance = f"{number.tolerance:.3g}"
        lines.append([TITLES[metric], expected, f"{number.found:.6g}", difference, tolerance, VERDICTS[number.right]])
    return markdown_table(["number", "expected", "found", "difference", "tolerance", "verdict"], lines)


def as_markdown(verdict: str, table: str, row: Row, rows: RowFile, facts: dict[str, Any]) -> str:
    settings = ", ".join(f"{key.rpartition('.')[2]} {facts['samples'][key]}" for key in SHOWN)
    weights, evaluation, group = facts["weights"], facts["evaluation"], rows.tolerances[row.tolerance]
    lines = [
        f"- published: {row.published}",
        f"- samples: {settings}",
        f"- weights: {weights['file']}, sha256 {weights['sha256']}",
        f"- reference: {evaluation['reference']['file']}, sha256 {evaluation['reference']['sha256']}",
        f"- features: {evaluation['weights']['file']}, sha256 {evaluation['weights']['sha256']}",
        f"- environment: {', '.join(facts['environment'])}",
        *(f"- tolerance of {TITLES[key]}: {value.reason}" for key, value in group.items() if row.expected.get(key)),
    ]
    return "\n".join([verdict, "", table, "", *lines]) + "\n"


def conclude(name: str, row: Row, rows: RowFile, config: Config, samples: Path, reference: str) -> bool:
    """Print and write the verdict on samples; whether it is PASS."""
    facts = facts_of(row, config, samples, reference)
    judged = rows.judge(row, facts["evaluation"]["metrics"])
    if other := other_settings(row, config, samples, facts):
        judged = {metric: dataclasses.replace(number, right=None) for metric, number in judged.items()}
    verdict, table = verdict_of(name, judged, other), table_of(judged)
    numbers = {metric: dataclasses.asdict(number) for metric, number in judged.items()}
    found = {"verdict": verdict, "numbers": numbers, "other settings": other, "published": row.published, **facts}
    write_text(samples.with_suffix(".verdict.json"), json.dumps(found, indent=2) + "\n")
    write_text(samples.with_suffix(".verdict.md"), as_markdown(verdict, table, row, rows, facts))
    print(f"{table}\n\n{verdict}\nreport: {samples.with_suffix('.verdict.md')} and .json beside it")
    return verdict == f"{name}: PASS"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", help="name of a row")
    parser.add_argument("--samples", type=Path, metavar="NPZ", help="samples that the evaluator has scored")
    parser.add_argument("--rows", type=Path, default=ROOT / "configs/published_results.yaml", help="the file of rows")
    parser.add_argument("--checkpoint", help="in place of the row's, where the file lies elsewhere")
    parser.add_argument("--reference", help="in place of the one that the file of rows names")
    args = parser.parse_args()
    rows = RowFile(args.rows)
    row = rows[args.row]
    reference = args.reference or rows.reference.file
    arguments = row.arguments(args.checkpoint or row.checkpoint)
    try:
        config = load_config(["experiment.output_dir=unused", *arguments])
    except InputError as error:
        raise InputError(f"{args.rows}: row {args.row}: {error}") from error
    if args.samples is None:
        check_files(row, config, reference, rows.reference.get)
        print("\n".join([row.backend, reference, *arguments]))
    elif not conclude(args.row, row, rows, config, args.samples, reference):
        raise SystemExit(1)


if __name__ == "__main__":
    with input_errors_exit():
        main()
