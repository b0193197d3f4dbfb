"""The table of tokenizers, by `model.vq_model.model_type`, and what is chosen from it."""

from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from modeling.tokenizers.codes_only import CodesOnly
from modeling.tokenizers.maskgit_vq import MaskGitVQ
from modeling.tokenizers.titok import TiTok
from modeling.tokenizers.tokenizer import Tokenizer
from utils.errors import InputError
from utils.files.hub import local_file
from utils.files.weights import load_strict
from utils.schema import Config, VQModelConfig

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "maskgit_vq": MaskGitVQ,
    "titok": TiTok,
    "codes_only": CodesOnly,
}


def build_tokenizer(config: VQModelConfig) -> Tokenizer:
    """A tokenizer of these sizes with random weights.

    Raises:
        InputError: sizes that do not fit together.
    """
    return TOKENIZERS[config.model_type](config)


def load_tokenizer(config: Config) -> Tokenizer:
    """The frozen tokenizer of `experiment.tokenizer_checkpoint` in eval mode, float32 (also from fp16 files), on CPU.

    Raises:
        InputError: the file is missing, damaged or refused, or its keys or shapes differ from `model.vq_model`.
    """
    vq_model = config.model.vq_model
    path = local_file(config.experiment.tokenizer_checkpoint)
    state = TOKENIZERS[vq_model.model_type].read_state(path)
    tokenizer = build_tokenizer(vq_model)
    if tokenizer.image_seq_len != vq_model.num_latent_tokens:
        raise InputError(
            f"model.vq_model.num_latent_tokens={vq_model.num_latent_tokens}: expected {tokenizer.image_seq_len} "
            f"(codes of shape {tokenizer.code_shape} of model_type={vq_model.model_type})"
        )
    load_strict(tokenizer, state, path)
    return tokenizer.eval().requires_grad_(False)


def tokenizer_sizes(state: dict[str, Tensor]) -> VQModelConfig:
    """`model.vq_model` for the tokenizer with this state dict, of whatever type; see `Tokenizer.sizes_of`.

    Raises:
        InputError: keys of no tokenizer in the table.
    """
    problems = []
    for model_type, tokenizer_class in TOKENIZERS.items():
        try:
            return replace(tokenizer_class.sizes_of(state), model_type=cast(Any, model_type))
        except InputError as error:
            problems.append(str(error))
    raise InputError("; ".join(problems))


def code_shape(config: VQModelConfig) -> tuple[int, ...]:
    """`Tokenizer.code_shape` of the tokenizer that a config describes, without building it.

    Raises:
        InputError: sizes that do not fit together.
    """
    return TOKENIZERS[config.model_type].code_shape_of(config)
