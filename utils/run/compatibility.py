"""Whether a run is the one that wrote a checkpoint: what must be equal, and what may differ with a notice.

The schema annotates which keys may differ.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from utils.config import flat
from utils.errors import InputError
from utils.keys import MAY_CHANGE, SILENT, keys_of
from utils.run.manifest import Provenance, read_manifest, versions
from utils.run.resume import Start
from utils.schema import Config


def check_same_run(start: Start, config: Config, provenance: Provenance, global_batch_size: int) -> list[str]:
    """Compare with the run that wrote the checkpoint, before anything is loaded.

    Returns:
        A line for every other difference that a reader of the log should know of.

    Raises:
        InputError: another model, other data, or another global batch without `training.allow_batch_change`.
    """
    if start.checkpoint is None or start.weights_only:
        return []
    manifest = read_manifest(Path(start.checkpoint))
    changes = differences(manifest.provenance.config, asdict(config))
    keys = keys_of(type(config))
    model_changes = [
        line for key, line in changes.items() if key.startswith("model.") and not keys[key].has(MAY_CHANGE)
    ]
    if model_changes:
        raise InputError(f"{start.checkpoint}: written by another model: {'; '.join(model_changes)}")
    if manifest.provenance.data_hash != provenance.data_hash:
        raise InputError(
            f"{start.checkpoint}: written on other training data: found hash {provenance.data_hash[:12]}..., expected "
            f"{manifest.provenance.data_hash[:12]}...; use another experiment.output_dir, or the data of that run"
        )
    theirs, ours = manifest.provenance.tokenizer_sha256, provenance.tokenizer_sha256
    if not (theirs in (None, ours) or config.experiment.allow_other_tokenizer):
        raise InputError(
            f"{start.checkpoint}: trained with the tokenizer of sha256 {str(theirs)[:12]}..., found {str(ours)[:12]}..."
            " in experiment.tokenizer_checkpoint; experiment.allow_other_tokenizer=true takes it all the same"
        )
    written_at = manifest.state.global_batch_size
    if written_at != global_batch_size and not config.training.allow_batch_change:
        raise InputError(
            f"{start.checkpoint}: written at a global batch of {written_at} images, found {global_batch_size} = "
            "per_gpu_batch_size * gradient_accumulation_steps * processes; keep the product, or set "
            "training.allow_batch_change=true"
        )
    notices = [line for key, line in changes.items() if not keys[key].has(SILENT)]
    if manifest.provenance.code_hash != provenance.code_hash:
        notices.append("the code has changed")
    notices += differences(manifest.versions, versions()).values()
    return [f"since {Path(start.checkpoint).name}: {notice}" for notice in notices]


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """By dotted key: `key=new, was old`, for keys that both have."""
    old, new = dict(flat(old)), dict(flat(new))
    common = [key for key in new if key in old and old[key] != new[key]]
    return {key: f"{key}={new[key]}, was {old[key]}" for key in common}
