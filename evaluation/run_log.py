"""Append the scores of samples to the metrics of the training run, at the step of the sampled weights."""

from pathlib import Path

from utils.errors import InputError
from utils.files.json_file import read_json
from utils.files.provenance import problem_of_files
from utils.run.metrics_file import METRICS_FILE, MetricsFile, read_metrics


def find_step(samples: Path, run: Path) -> int:
    """The step of the weights behind `samples`, from the sampler's record next to them. Raises InputError if it is
    missing, has no step, or belongs to another file or run."""
    if not (run / METRICS_FILE).is_file():
        raise InputError(f"--log-to {run}: found no {METRICS_FILE}, expected the folder of a training run")
    path = samples.with_suffix(".json")
    if not path.is_file():
        raise InputError(f"{path}: missing; --log-to needs the sampler's record, which states the step")
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise InputError(f"{path}: found no 'step'; sample again from a run folder or a checkpoint into another output")
    is_described = "bytes" in record or samples.name in record.get("files", {})
    problem = problem_of_files(samples, path, record) if is_described else "found no hash of it"
    if problem is not None:
        raise InputError(f"{path}: describes another file than {samples}: {problem}")
    parents = Path(record.get("weights", "")).parents
    run_of_weights = next((folder for folder in parents if (folder / METRICS_FILE).is_file()), run)
    if not run_of_weights.samefile(run):
        raise InputError(f"--log-to {run}: the weights of {samples} are from another run, {run_of_weights}")
    return record["step"]


def log_scores(run: Path, step: int, scores: dict[str, float]) -> None:
    """Append `eval/<name>` to the run's metrics unless these values are there; a running training may append too."""
    path = run / METRICS_FILE
    values = {f"eval/{name}": value for name, value in scores.items()}
    if any(row["step"] == step and values.items() <= row.items() for row in read_metrics(path)):
        return
    metrics = MetricsFile(path)
    metrics.append(step, values)
    metrics.flush()
