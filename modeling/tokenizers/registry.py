"""The table of tokenizers, by `model.vq_model.model_type`."""

from dataclasses import asdict

import torch
from torch import Tensor

from modeling.tokenizers.codes_only import CodesOnly
from modeling.tokenizers.llamagen_vq import LlamaGenVQ
from modeling.tokenizers.maskgit_vq import MaskGitVQ
from modeling.tokenizers.patch_vq import PatchVQ
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
    "patch_vq": PatchVQ,
    "vqplus": VQPlus,
    "titok": TiTokVQ,
    "codes_only": CodesOnly,
}


def build_tokenizer(config: VQModelConfig) -> Tokenizer:
    """A tokenizer with random weights; raises InputError for sizes that do not fit together, or a value for a key that
    this tokenizer does not read."""
    return TOKENIZERS[config.model_type].from_section(config)


def build_trainable_tokenizer(config: VQModelConfig) -> TrainableTokenizer:
    """Like `build_tokenizer`; raises InputError also for a tokenizer that cannot be trained here."""
    tokenizer = build_tokenizer(config)
    if not isinstance(tokenizer, TrainableTokenizer):
        trainable = [name for name, kind in TOKENIZERS.items() if issubclass(kind, TrainableTokenizer)]
        raise InputError(f"model.vq_model.model_type={config.model_type}: expected one of {', '.join(trainable)}")
    return tokenizer


def check_weights(config: VQModelConfig, state: dict[str, Tensor], source: object) -> None:
    """The checks of `Tokenizer.load_weights` on the entries of a file; raises InputError."""
    with torch.device("meta"):
        tokenizer = build_tokenizer(config)
    check_fits(tokenizer, tokenizer.weights_of(state, source), source)


def config_from_state_dict(state: dict[str, Tensor]) -> VQModelConfig:
    """`model.vq_model` of the tokenizer with this state dict, of any kind; raises InputError if no tokenizer has these
    keys."""
    problems = []
    for model_type, tokenizer_class in TOKENIZERS.items():
        try:
            own = asdict(tokenizer_class.config_from_state_dict(state))
            return VQModelConfig(**{**own, "model_type": model_type})
        except InputError as error:
            problems.append(str(error))
    raise InputError("; ".join(problems))


def code_shape(config: VQModelConfig) -> tuple[int, ...]:
    """`Tokenizer.code_shape`, without allocating weights."""
    with torch.device("meta"):
        return build_tokenizer(config).code_shape
