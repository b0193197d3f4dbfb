"""The table of tokenizers, by `model.vq_model.model_type`, and what is chosen from it."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from modeling.tokenizers.codes_only import CodesOnly
from modeling.tokenizers.llamagen_vq import LlamaGenVQ
from modeling.tokenizers.maskgit_vq import MaskGitVQ
from modeling.tokenizers.taming_vqgan import TamingVQGAN
from modeling.tokenizers.titok import TiTokVQ
from modeling.tokenizers.tokenizer import Tokenizer, TrainableTokenizer
from modeling.tokenizers.vq_plus import VQPlus
from utils.errors import InputError
from utils.files.weights import check_fits
from utils.schema import VQModelConfig

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "maskgit_vq": MaskGitVQ,
    "llamagen_vq": LlamaGenVQ,
    "taming_vqgan": TamingVQGAN,
    "vqplus": VQPlus,
    "titok": TiTokVQ,
    "codes_only": CodesOnly,
}


def build_tokenizer(config: VQModelConfig) -> Tokenizer:
    """A tokenizer of these sizes with random weights.

    Raises:
        InputError: sizes that do not fit together, or a key that this kind of tokenizer does not read.
    """
    return _class_of(config)(config)


def build_trainable_tokenizer(config: VQModelConfig) -> TrainableTokenizer:
    """
    Raises:
        InputError: as `build_tokenizer`, or a kind of tokenizer that is not trained here.
    """
    tokenizer = build_tokenizer(config)
    if not isinstance(tokenizer, TrainableTokenizer):
        trainable = [name for name, kind in TOKENIZERS.items() if issubclass(kind, TrainableTokenizer)]
        raise InputError(f"model.vq_model.model_type={config.model_type}: expected one of {', '.join(trainable)}")
    return tokenizer


def _class_of(config: VQModelConfig) -> type[Tokenizer]:
    tokenizer_class = TOKENIZERS[config.model_type]
    not_read = {key for other in TOKENIZERS.values() for key in other.own_keys} - {*tokenizer_class.own_keys}
    for key in sorted(not_read):
        if (value := getattr(config, key)) != getattr(VQModelConfig(), key):
            raise InputError(f"model.vq_model.{key}={value}: {config.model_type} does not read it; leave it out")
    return tokenizer_class


def check_weights(config: VQModelConfig, state: dict[str, Tensor], source: object) -> None:
    """The checks of `Tokenizer.load_weights` on the entries of a file, for one of these sizes, which is not built.

    Raises:
        InputError: as `build_tokenizer` and `Tokenizer.load_weights`.
    """
    with torch.device("meta"):
        tokenizer = build_tokenizer(config)
    check_fits(tokenizer, tokenizer.weights_of(state, source), source)


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
    return _class_of(config).code_shape_of(config)
