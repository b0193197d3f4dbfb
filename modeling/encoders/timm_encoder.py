"""Any image model of timm (https://github.com/huggingface/pytorch-image-models) as a frozen encoder.

Mean and std are those that timm states for the weights. For patch features, images are resized as in REPA's code
(https://github.com/sihyun-yu/REPA): to a side of g patches, bicubic without antialiasing. It normalizes DINOv2's input
before the resize and CLIP's after it; both are linear, so the order does not matter.

For features of whole images, images are resized as in the common FD-DINOv2 (https://github.com/NVlabs/edm2): bicubic
with antialiasing.
"""

import difflib
import re
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.encoders.encoder import FrozenEncoder, on_grid
from utils.errors import InputError, first_line
from utils.files.hashing import file_sha256
from utils.files.hub import local_file
from utils.files.weights import load_state_dict, load_strict
from utils.keys import did_you_mean

DINOV2_SIZE = 224  # pixels, as in published uses of its image features; timm states 518, the size in its training
WITHOUT_FINAL_NORM = re.compile(r"\.mae$|_clip_")  # REPA's code reads their patches before the final norm


class TimmEncoder(FrozenEncoder):
    """Patch features are the patch tokens of a vision transformer, or the last map of any other network, resampled to
    the grid. Image features are what timm's classifier would read: the class token or pooled features.

    Args:
        model: a name that `timm.list_models` knows, perhaps with the tag of its weights.
        weights: a path or hf://OWNER/REPO/FILE; None: timm's weights on the Hub.
        grid_size: g; None: for image features.

    Raises:
        InputError: an unknown model, or missing or wrong weights.
    """

    packages = ("timm",)
    network: Any
    mean: Tensor
    std: Tensor

    def __init__(self, model: str, weights: str | None = None, grid_size: int | None = None) -> None:
        super().__init__()
        self.name, self.grid_size = model, grid_size
        with torch.device("meta"):
            outline = _create(model)
        self.is_vit = getattr(outline, "num_prefix_tokens", None) is not None and hasattr(outline, "patch_embed")
        config = timm.data.resolve_model_data_config(outline)
        self.input_size = DINOV2_SIZE if "dinov2" in model else config["input_size"][-1]
        if self.is_vit and grid_size is not None:
            self.input_size = grid_size * outline.patch_embed.patch_size[0]
        path = local_file(weights or _on_the_hub(model))
        self.network = _create(model, **({"img_size": self.input_size} if self.is_vit else {}))
        load_strict(self.network, _state_of(path, self.network), path)
        self.weights_name, self.weights_sha256 = path.name, file_sha256(path, progress=True)
        if grid_size is not None and WITHOUT_FINAL_NORM.search(model):
            self.network.norm = nn.Identity()
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        self.patch_dim = self.network.num_features
        self.eval().requires_grad_(False)
        self.image_dim = self.image_features(torch.zeros(1, 8, 8, 3, dtype=torch.uint8)).shape[1]

    def preprocess(self, images: Tensor, antialias: bool) -> Tensor:
        """Normalized images (B, 3, `input_size`, `input_size`)."""
        x = (images - self.mean) / self.std
        if x.shape[2:] == (self.input_size, self.input_size):
            return x
        return F.interpolate(x, (self.input_size, self.input_size), mode="bicubic", antialias=antialias)

    def _patch_features(self, images: Tensor) -> Tensor:
        assert self.grid_size is not None
        found = self.network.forward_features(self.preprocess(images, antialias=False))
        if self.is_vit:
            patches = found[:, self.network.num_prefix_tokens :]  # (B, g * g, Z)
            return self.network.fc_norm(patches) if hasattr(self.network, "fc_norm") else patches
        if found.shape[1] != self.patch_dim:  # (B, h, w, Z), as of Swin
            found = found.permute(0, 3, 1, 2)
        return on_grid(found, self.grid_size)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.network(self.preprocess(pixels / 255, antialias=True))


def _create(model: str, **options: Any) -> Any:
    try:
        return timm.create_model(model, pretrained=False, num_classes=0, **options)
    except (RuntimeError, ValueError) as error:
        near = did_you_mean(difflib.get_close_matches(model, timm.list_models(), 1, 0.3))
        raise InputError(f"encoder timm:{model}: expected a model of timm: {first_line(error)}{near}") from error


def _on_the_hub(model: str) -> str:
    config = timm.models.get_pretrained_cfg(model)
    if config is None or not config.hf_hub_id:
        raise InputError(f"encoder timm:{model}: timm names no weights on the Hub; give a file, timm:{model}:FILE")
    return f"hf://{config.hf_hub_id}/{config.hf_hub_filename or 'model.safetensors'}"


def _state_of(path: Path, network: Any) -> dict[str, Tensor]:
    """The weights in a file, converted as timm does (names, position embeddings of a different size), without the
    classifier."""
    state = load_state_dict(path)
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, network)
    classifier = network.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return {key: value for key, value in state.items() if not key.startswith(tuple(f"{name}." for name in names))}
