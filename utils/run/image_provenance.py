"""The provenance of sampled images; see `utils.files.provenance`."""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from utils.config import flat
from utils.files.weights import weights_sha256
from utils.run.run_environment import code_facts
from utils.schema import Config


def image_provenance(
    config: Config,
    *,
    class_labels: list[int],
    indices: list[int],
    model: nn.Module,
    tokenizer: nn.Module,
    device: torch.device,
) -> dict[str, Any]:
    """The provenance by config key; `sampling` selects `class_labels` and `indices`."""
    facts = dict(flat({"model": asdict(config.model), "sampling": asdict(config.sampling)}))
    del facts["sampling.images_per_class"]
    return {
        **facts,
        "sampling.num_fid_samples": len(indices),
        "sampling.class_labels": None if config.sampling.class_labels is None else class_labels,
        "training.enable_tf32": config.training.enable_tf32,
        "device": device.type,
        "sha256 of experiment.generator_checkpoint": weights_sha256(model),
        "sha256 of experiment.tokenizer_checkpoint": weights_sha256(tokenizer),
        **code_facts(),
    }
