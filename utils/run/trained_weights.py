"""Which weights a path means, and whether they are those that were written.

A file means itself, a checkpoint folder its EMA or else its model, a run folder its newest complete state.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files.hashing import file_sha256
from utils.files.hub import local_file
from utils.files.weights import read_record
from utils.run.checkpoint import EMA, MODEL, UNFINISHED, checkpoint_folders, step_of
from utils.run.manifest import MANIFEST_FILE, check_sizes
from utils.run.status import STATUS_FILE, read_status
from utils.schema import ExperimentConfig

FINAL_FILE = "model.safetensors"  # of a run folder, and of a folder in the published layout


@dataclass
class TrainedWeights:
    """
    Attributes:
        path: the file to load.
        step: after how many steps; None: the file does not tell.
        tokenizer_sha256: of the tokenizer on whose codes they were trained; None: the file does not tell.
        record: all that the file or its checkpoint tells (`Provenance.record`).
        notices: lines for the user: what was chosen, and why.
    """

    path: Path
    step: int | None = None
    tokenizer_sha256: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def check_tokenizer(self, found: str, experiment: ExperimentConfig) -> None:
        """
        Raises:
            InputError: the weights are known to be trained on codes of another tokenizer than that of sha256 `found`.
        """
        expected = self.tokenizer_sha256
        if expected not in (None, found) and not experiment.allow_other_tokenizer:
            raise InputError(
                f"{self.path}: trained on codes of the tokenizer of sha256 {expected[:12]}..., found {found[:12]}... "
                f"in experiment.tokenizer_checkpoint={experiment.tokenizer_checkpoint}; "
                "experiment.allow_other_tokenizer=true takes it all the same"
            )


def find_trained_weights(source: str) -> TrainedWeights:
    """Choose the file, and check the content of a checkpoint or of a run's final weights against its hash.

    Args:
        source: a weights file, `hf://OWNER/REPO/FILE`, or a folder: a run, a checkpoint or the published layout.

    Raises:
        InputError: nothing there, or a folder that is damaged or was never complete.
    """
    path = local_file(source)
    if not path.is_dir():
        is_of_checkpoint = (path.parent / MANIFEST_FILE).is_file()
        return _of_checkpoint(path.parent, path.name) if is_of_checkpoint else _from_record(path)
    if (path / MANIFEST_FILE).is_file():
        return _of_checkpoint(path)
    if UNFINISHED.fullmatch(path.name):
        raise InputError(f"{path}: a checkpoint that was never complete or is half deleted")
    if (path / STATUS_FILE).is_file() or checkpoint_folders(path):
        return _of_run(path)
    return _from_record(path / FINAL_FILE) if (path / FINAL_FILE).is_file() else TrainedWeights(path)  # or shards


def _of_run(folder: Path) -> TrainedWeights:
    """The final weights, unless training has gone on since."""
    final = _from_record(folder / FINAL_FILE) if (folder / FINAL_FILE).is_file() else None
    passed_over = []
    for checkpoint in reversed(checkpoint_folders(folder)):
        if final is not None and (final.step is None or final.step >= step_of(checkpoint)):
            break
        try:
            newest = _of_checkpoint(checkpoint)
        except InputError as error:
            passed_over.append(f"passed over: {error}")
            continue
        status = read_status(folder).status if (folder / STATUS_FILE).is_file() else "unknown"
        older = f"; its {FINAL_FILE} is of step {final.step}" if final else ""
        newest.notices = [*passed_over, f"{folder}: taking {checkpoint.name} (the run is {status}{older})"]
        return newest
    if final is None:
        reasons = "; ".join(passed_over) or "no complete checkpoint yet"
        raise InputError(f"{folder}: found no weights: {reasons}")
    final.notices += passed_over
    return final


def _of_checkpoint(folder: Path, name: str | None = None) -> TrainedWeights:
    """A weights file of a checkpoint, by default that of its EMA or else of its model."""
    manifest = check_sizes(folder)
    names = [name] if name else [f"{EMA}.safetensors", f"{MODEL}.safetensors"]
    name = next((name for name in names if name in manifest.files), None)
    if name is None:
        raise InputError(f"{folder}: found none of {', '.join(names)} in its {MANIFEST_FILE}")
    found, expected = file_sha256(folder / name), manifest.files[name].sha256
    if found != expected:
        raise InputError(f"{folder / name}: damaged, found sha256 {found[:12]}..., expected {expected[:12]}...")
    step, provenance = manifest.state.global_step, manifest.provenance
    return TrainedWeights(folder / name, step, provenance.tokenizer_sha256, provenance.record(step))


def _from_record(path: Path) -> TrainedWeights:
    record = read_record(path)
    return TrainedWeights(path, record.get("step"), record.get("tokenizer_sha256"), record)
