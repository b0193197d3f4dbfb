"""Only the codebook of a tokenizer: enough to train a generator on its codes and to sample codes."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from modeling.tokenizers.tokenizer import Tokenizer
from utils.errors import InputError
from utils.schema import TokenizerConfig


class CodesOnly(Tokenizer):
    """Codes and their vectors (V, Z), from a `.npy` file or from tensors under the key `codebook`; no images."""

    has_images = False

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.token_size))

    @classmethod
    def read_state(cls, path: Path) -> dict[str, Tensor]:
        if path.suffix != ".npy":
            return super().read_state(path)
        try:
            with path.open("rb") as file:
                codebook = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as a NumPy array: {error}") from error
        is_table = codebook.ndim == 2 and codebook.dtype.kind == "f"
        with np.errstate(over="ignore"):  # too large for float32: infinite, which is refused
            vectors = codebook.astype(np.float32) if is_table else None
        if vectors is None or not np.isfinite(vectors).all():
            raise InputError(f"{path}: found {codebook.dtype} {codebook.shape}, expected finite floats (V, Z)")
        return {"codebook": torch.from_numpy(vectors)}

    @classmethod
    def config_from_state_dict(cls, state: dict[str, Tensor]) -> TokenizerConfig:
        if [*state] != ["codebook"] or state["codebook"].ndim != 2:
            raise InputError("weights of another kind: expected a codebook (V, Z) alone")
        codebook_size, token_size = state["codebook"].shape
        return TokenizerConfig(codebook_size=codebook_size, token_size=token_size)

    @property
    def code_shape(self) -> tuple[int, ...]:
        return (self.config.num_latent_tokens,)

    @property
    def decoder_activations(self) -> int:
        return 0

    def encode_latents(self, images: Tensor) -> Tensor:
        raise self.no_images("encode")

    def quantize_latents(self, latents: Tensor) -> Tensor:
        raise self.no_images("quantize_latents")

    def codebook_lookup(self, codes: Tensor) -> Tensor:
        return self.codebook[codes]

    def _decode(self, codes: Tensor) -> Tensor:
        raise self.no_images("decode")
