"""The config schema: each key with its type, default and meaning.

To add a key, add a line here and the code that reads it. Its range is checked, and `python -m utils.config --keys` and
the --help of the scripts explain it. `utils/keys.py` has the types with ranges and the annotations for resuming.
Sections that one script alone reads are declared in that script.

Key names are the RAR / TiTok / reAR family's, so that its YAML files load unchanged. Steps are optimizer steps.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from utils.keys import (
    MISSING,
    REQUIRED,
    Fraction,
    FractionBelow1,
    MayChange,
    NonEmpty,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Silent,
    key,
    section,
)

# Tokenizers whose num_latent_tokens must be given: it does not follow from resolution and channel_mult.
OWN_NUMBER_OF_CODES = ("titok", "codes_only")
# Keys of model.generator that choose how to sample, not what to train; graphs, provenance and cards read this list.
SAMPLING_NAMES = ("guidance_scale", "guidance_scale_pow", "randomize_temperature", "top_k", "top_p")
SAMPLING_KEYS = tuple(f"model.generator.{name}" for name in SAMPLING_NAMES)
GRID = "(resolution / 2^(levels - 1))^2"

Temperature = Annotated[float, Meta(ge=1e-6)]
GuidanceScale = Annotated[float, Meta(ge=0, le=1000)]


@dataclass
class ExperimentConfig:
    """The run: its folder, saves, logs, validation and the weights that it starts from."""

    project: Silent[str] = key("rear", "wandb project")
    name: Silent[str] = key("rear", "wandb run name")
    entity: Silent[str | None] = key(None, "wandb entity (user or team); null: wandb's default")
    group: Silent[str | None] = key(None, "wandb group, for the runs of one study")
    tags: Silent[list[str]] = key([], "wandb tags")
    output_dir: Silent[str] = key(MISSING, "run folder; the sampler writes <output_dir>.npz")
    max_train_examples: PositiveInt = key(1_281_167, "images per epoch (ten crops of an image count once), for the log")
    save_every: Silent[PositiveInt] = key(50_000, "steps between checkpoints")
    keep_last: Silent[Annotated[int, Meta(ge=2)]] = key(2, "number of newest checkpoints to keep")
    keep_every: Silent[NonNegativeInt] = key(0, "keep checkpoints at multiples of this step for good; 0: none")
    save_weights_every: Silent[NonNegativeInt] = key(0, "steps between weights files, kept for good; 0: none")
    max_save_failures: Silent[PositiveInt] = key(3, "end the run after this many failed saves in a row")
    generate_every: Silent[PositiveInt] = key(5_000, "steps between sample grids")
    log_every: Silent[PositiveInt] = key(50, "steps between log lines, each the mean over these steps")
    eval_every: Silent[NonNegativeInt] = key(0, "steps between validation losses (on dataset.params.eval_...); 0: none")
    eval_samples: Silent[NonNegativeInt] = key(
        0, "samples for a Frechet distance to the validation images, with each validation loss; 0: none"
    )
    init_from: str | None = key(None, "fine-tune from these weights, given as generator_checkpoint; classes are new")
    resume: Silent[str] = key(
        "auto",
        "auto: resume if there is a checkpoint; true: require one; false: start from step 0; or the path of one",
        words=("auto", "true", "false"),
    )
    tokenizer_checkpoint: Silent[str] = key(
        "ckpt/maskgitvq.bin", "tokenizer weights: .bin, .safetensors or hf://OWNER/REPO/FILE"
    )
    allow_other_tokenizer: Silent[bool] = key(False, "accept a different tokenizer from the one used in training")
    generator_checkpoint: Silent[str | None] = key(
        None, "weights to sample from: a file (or hf://...), checkpoint or run folder"
    )


@dataclass
class TokenizerConfig:
    """Keys of every tokenizer."""

    model_type: Literal["maskgit_vq", "llamagen_vq", "taming_vqgan", "patch_vq", "vqplus", "titok", "codes_only"] = key(
        "maskgit_vq", "tokenizer (docs/tokenizers.md)"
    )
    codebook_size: PositiveInt = key(1024, "V, size of the codebook")
    token_size: PositiveInt = key(256, "Z, width of a codebook vector")
    num_latent_tokens: PositiveInt = key(
        256,
        "N, tokens per image (levels: length of channel_mult); must be given for titok and codes_only",
        equals=GRID,
    )
    resolution: PositiveInt = key(256, "height and width of an image in pixels")


@dataclass
class ConvTokenizerConfig(TokenizerConfig):
    """Keys of tokenizers with a convolutional network, and of the legacy TiTok's decoder."""

    hidden_channels: PositiveInt = key(128, "channels of the first level")
    channel_mult: NonEmpty[list[PositiveInt]] = key(
        [1, 1, 2, 2, 4],
        "channels of each level, as multiples of hidden_channels; the resolution halves between levels; patch_vq: a 1 "
        "for each level",
    )
    num_res_blocks: PositiveInt = key(2, "residual blocks per level")


@dataclass
class VQGANConfig(ConvTokenizerConfig):
    z_channels: PositiveInt = key(256, "llamagen_vq, taming_vqgan: channels before the 1x1 convolution to token_size")


@dataclass
class VQPlusConfig(ConvTokenizerConfig):
    quantizer_type: Literal["lookup", "lookup-free"] = key(
        "lookup", "vqplus: nearest codebook vector, or the signs of token_size channels"
    )


@dataclass
class TiTokConfig(ConvTokenizerConfig):
    is_legacy: bool = key(True, "titok: decode to tokens of MaskGIT-VQ (L-32, B-64, S-128); false: to pixels")
    use_l2_norm: bool = key(
        True,
        "titok: normalize features and codebook vectors before the lookup",
        default_from="model.vq_model.is_legacy",
    )
    vit_enc_model_size: Literal["tiny", "small", "base", "large"] = key("base", "titok: encoder; tiny: for tests")
    vit_dec_model_size: Literal["tiny", "small", "base", "large"] = key("base", "titok: decoder")
    vit_enc_patch_size: PositiveInt = key(16, "titok: height and width of the encoder's patches in pixels")
    vit_dec_patch_size: PositiveInt = key(16, "titok: height and width of the decoder's patches in pixels")


@dataclass
class VQModelConfig(VQGANConfig, VQPlusConfig, TiTokConfig):
    """Keys of all tokenizers in one section, as in the published files; a key of a different tokenizer is an error."""


@dataclass
class TapConfig:
    """An alignment tap: a projector of a hidden state, and the vectors that it should point at (docs/alignment.md)."""

    name: str = key(REQUIRED, "name of the term in the log (train/<name>_cos) and of its projector (<name>_align_mlp)")
    target: str = key(
        "codebook", "what the projection is compared with: codebook, permuted_codebook, encoder or stored"
    )
    source: str | None = key(
        None, "of encoder: efficientnet_lite0 or timm:NAME[:FILE]; of stored: an .npy file; of the others: null"
    )
    layer: NonNegativeInt = key(0, "block, from 0, whose output the projector reads")
    positions: Literal["own", "next"] = key("own", "where a token is the input (own) or is predicted (next)")
    weight: NonNegativeFloat = key(1.0, "weight of the term in train/proj_loss; 0: no term")
    end_step: NonNegativeInt | None = key(None, "step from which on the term is 0; null: never")
    exclude: Literal["none", "perturbed"] = key("none", "perturbed: leave out the positions with a replaced token")
    z_dim: PositiveInt | None = key(None, "Z, width of a target vector; null: model.generator.z_dim")


@dataclass
class GeneratorConfig:
    """The transformer: sizes, sampling, perturbation, orders and embedding regularization."""

    hidden_size: PositiveInt = key(768, "D, width of the blocks")
    num_hidden_layers: PositiveInt = key(24, "number of blocks")
    num_attention_heads: PositiveInt = key(16, "attention heads of each block; divides hidden_size")
    intermediate_size: PositiveInt = key(3072, "hidden width of the MLPs")
    dropout: MayChange[FractionBelow1] = key(0.1, "dropout after the attention projection and in the MLP")
    attn_drop: MayChange[FractionBelow1] = key(0.1, "dropout on attention probabilities")
    class_label_dropout: MayChange[Fraction] = key(0.1, "probability of the null class in training")
    image_seq_len: PositiveInt = key(256, "N, tokens per image", equals="model.vq_model.num_latent_tokens")
    condition_num_classes: PositiveInt = key(1000, "C, number of classes; class id C is the null class")
    randomize_temperature: MayChange[Temperature] = key(1.0, "sampling temperature")
    guidance_scale: MayChange[GuidanceScale] = key(
        14.5, "scale of power-cosine guidance; 1: no guidance; 0: as 1, as in the published code"
    )
    guidance_scale_pow: MayChange[NonNegativeFloat] = key(2.25, "exponent of power-cosine guidance; 0: constant scale")
    top_k: MayChange[NonNegativeInt] = key(0, "sample from the k most probable tokens; 0: from all")
    top_p: MayChange[Annotated[float, Meta(ge=1e-6, le=1)]] = key(
        1.0, "sample from the smallest set of tokens with this probability; 1: from all"
    )
    use_checkpoint: MayChange[bool] = key(False, "activation checkpointing: less memory, about a third more time")
    perturb_mode: MayChange[Literal["switch", "mask", "none"]] = key(
        "switch", "perturbation of the context: random tokens, the mask token, or none"
    )
    perturb_ratio_max: MayChange[Fraction] = key(1.0, "largest perturbation ratio of a sequence, before it anneals")
    perturb_ratio_fixed: MayChange[bool] = key(
        False, "perturb every sequence at the largest ratio instead of one drawn from U(0, largest)"
    )
    randomness_anneal_start: MayChange[NonNegativeInt] = key(0, "step at which the largest ratio starts to fall")
    randomness_anneal_end: MayChange[NonNegativeInt] = key(187_500, "step at which the largest ratio reaches 0")
    order: MayChange[Literal["raster", "random", "annealed"]] = key(
        "raster",
        "order of prediction in training: raster, random (drawn per sample and step), or annealed (random for a "
        "fraction of the samples that falls to 0)",
    )
    order_anneal_start: MayChange[NonNegativeInt] = key(125_000, "step at which that fraction starts to fall from 1")
    order_anneal_end: MayChange[NonNegativeInt] = key(187_500, "step at which that fraction reaches 0")
    transition_alignment: bool = key(True, "alignment terms, including `taps`; logged as train/proj_loss")
    transition_alignment_weight: MayChange[NonNegativeFloat] = key(1.0, "lambda, weight of train/proj_loss")
    transition_alignment_target: Literal["codebook", "permuted_codebook"] = key(
        "codebook", "target of encode and decode term; permuted_codebook: the vectors of other tokens, a control"
    )
    encode_align: bool = key(True, "encode term: recover the embedding of the current token")
    decode_align: bool = key(True, "decode term: predict the embedding of the next token")
    encode_align_layer_idx: NonNegativeInt = key(0, "block, from 0, whose output the encode term reads")
    decode_align_layer_idx: NonNegativeInt = key(18, "block, from 0, whose output the decode term reads")
    mask_perturbed_encode: MayChange[bool] = key(
        True, "encode term at unperturbed positions only (released code); false: at all positions (paper)"
    )
    projection_dim: PositiveInt = key(2048, "hidden width of the projectors")
    z_dim: PositiveInt = key(256, "output width of the projectors", equals="model.vq_model.token_size")
    init_projectors_last: bool = key(
        False,
        "draw the initial projectors after all other weights, which are then equal for a seed with and without "
        "alignment terms; false: encode and decode projector first, as in earlier runs",
    )
    taps: list[TapConfig] = key([], "further alignment terms, such as REPA's (docs/alignment.md)")


@dataclass
class ModelConfig:
    vq_model: VQModelConfig = section(VQModelConfig)
    generator: GeneratorConfig = section(GeneratorConfig)


@dataclass
class DatasetParams:
    """Training and validation data: tokens, images, or both."""

    pretokenization: str | None = key(
        None, "tokens: a .jsonl (converted once to a store next to it) or a .tokens store; null: train on images"
    )
    train_shards_path_or_url: str | None = key(
        None, 'training images: tar shards ("a-{000..252}.tar", a glob or URLs) or a folder per class'
    )
    eval_pretokenization: str | None = key(None, "validation tokens, as pretokenization")
    eval_shards_path_or_url: str | None = key(None, "validation images, as train_shards_path_or_url")
    cache_dir: Silent[str | None] = key(None, "folder on a local disk for copies of shards at URLs")
    cache_size_gb: Silent[PositiveFloat] = key(200.0, "largest size of cache_dir in GB (10^9 bytes)")
    num_workers_per_gpu: Silent[NonNegativeInt | None] = key(
        None, "data loader processes per rank; 0: the main process; null: 12 for images, 2 for tokens, up to the CPUs"
    )
    on_bad_sample: Literal["error", "skip"] = key(
        "error", "a bad line of a jsonl or an unreadable image: end, or skip it and count"
    )
    max_bad_fraction: Fraction = key(0.001, "with skip: end if more than this fraction is bad")
    verify_hashes: bool = key(False, "compare all tokens with the hashes of the store at the start")


@dataclass
class PreprocessingConfig:
    """From image files to the pixels that a tokenizer sees."""

    crop_size: PositiveInt = key(256, "height and width in pixels", equals="model.vq_model.resolution")
    resize_shorter_edge: PositiveInt = key(
        256, "shorter edge of an image in pixels before the crop", default_from="dataset.preprocessing.crop_size"
    )
    random_crop: bool = key(False, "random instead of center crop of training images")
    random_flip: bool = key(True, "mirror training images with probability 1/2")
    pretokenize_crops: Literal["center", "center_flip", "ten_crop"] = key(
        "ten_crop", "crops of an image that pretokenize.py encodes: 1, 2 or 10"
    )
    background: Literal["white", "grey", "black"] = key("white", "color behind transparent pixels")
    exif_orientation: bool = key(False, "rotate photos by their EXIF entry; false: ignore it, as ADM does")


@dataclass
class DatasetConfig:
    params: DatasetParams = section(DatasetParams)
    preprocessing: PreprocessingConfig = section(PreprocessingConfig)


@dataclass
class OptimizerParams:
    """Learning rate, betas and weight decay."""

    learning_rate: PositiveFloat = key(4e-4, "peak learning rate")
    beta1: FractionBelow1 = key(0.9, "AdamW's beta1")
    beta2: FractionBelow1 = key(0.96, "AdamW's beta2")
    weight_decay: NonNegativeFloat = key(0.03, "weight decay; none on biases, norms, embeddings and 1-D parameters")
    momentum: FractionBelow1 = key(0.95, "Muon's momentum")


@dataclass
class ParamGroupConfig:
    """Learning rate and weight decay of the parameters whose names match a pattern (docs/training.md)."""

    pattern: str = key(REQUIRED, "regular expression, searched for in the names of the parameters")
    lr_factor: NonNegativeFloat = key(1.0, "learning rate as a multiple of the schedule's")
    weight_decay: NonNegativeFloat | None = key(None, "weight decay; null: as without the group")


@dataclass
class OptimizerConfig:
    """The optimizer and its parameter groups."""

    name: Literal["adamw", "muon"] = key(
        "adamw",
        "adamw: decoupled weight decay; muon: Muon for the blocks' matrices, AdamW for the rest (torch >= 2.9)",
    )
    params: OptimizerParams = section(OptimizerParams)
    param_groups: list[ParamGroupConfig] = key(
        [], "learning rate and weight decay of parameters by name; the first pattern found in a name decides"
    )


@dataclass
class LRSchedulerParams:
    """Peak, warm-up and end of the learning rate."""

    learning_rate: PositiveFloat = key(
        4e-4, "peak learning rate of the optimizer", equals="optimizer.params.learning_rate"
    )
    warmup_steps: NonNegativeInt = key(62_500, "steps of linear warm-up from 0")
    end_lr: NonNegativeFloat = key(1e-5, "learning rate at max_train_steps")


@dataclass
class LRSchedulerConfig:
    """The learning-rate schedule."""

    scheduler: Literal["cosine"] = key("cosine", "linear warm-up, then cosine to end_lr")
    params: LRSchedulerParams = section(LRSchedulerParams)


@dataclass
class TrainingConfig:
    """The optimizer steps: batch, precision, length, EMA, faults and processes."""

    gradient_accumulation_steps: Silent[PositiveInt] = key(
        1, "micro-batches per step; derived if global_batch_size is given"
    )
    global_batch_size: Silent[PositiveInt | None] = key(
        None, "images per step on all ranks; null: per_gpu_batch_size * gradient_accumulation_steps * ranks"
    )
    allow_batch_change: Silent[bool] = key(False, "resume a checkpoint written at a different global batch size")
    per_gpu_batch_size: Silent[PositiveInt] = key(256, "images per rank and micro-batch")
    mixed_precision: Literal["auto", "bf16", "no"] = key(
        "auto", "bf16 (autocast) or no (float32); auto: bf16 on CUDA, since few CPUs are fast at it"
    )
    compile: Literal["auto", "on", "off"] = key(
        "auto", "compile the blocks; auto: on CUDA unless sharded; takes about a minute on a CPU"
    )
    enable_tf32: bool = key(True, "TF32 matrix products on NVIDIA GPUs")
    enable_wandb: Silent[bool] = key(True, "log to wandb too; metrics.jsonl is always written")
    use_ema: bool = key(False, "keep an exponential moving average of the weights and sample from it")
    ema_decay: FractionBelow1 = key(0.9999, "decay of the EMA per step, to which it rises in 9 / (1 - ema_decay) steps")
    seed: Seed = key(42, "seed of initialization, data order and training noise")
    max_train_steps: NonNegativeInt = key(250_000, "length of the run and its schedules")
    max_grad_norm: PositiveFloat = key(1.0, "clip gradients to this norm; very large: never")
    max_nonfinite_steps: PositiveInt = key(
        5, "end the run after this many steps in a row with a non-finite loss or gradient"
    )
    launch_timeout: Silent[PositiveInt] = key(120, "seconds until all processes must have joined")
    process_group_timeout: Silent[PositiveInt] = key(600, "seconds without an answer after which a rank counts as dead")
    fsdp: Silent[bool] = key(False, "shard parameters, gradients, optimizer state and EMA over all ranks (FSDP2)")
    profile: Silent[str | None] = key(
        None, "START:STOP: trace steps START to STOP - 1, from 0, to <output_dir>/profile/; null: none"
    )
    deterministic: bool = key(False, "bit-equal results on a GPU, slower")
    stop_steps: Silent[NonNegativeInt | None] = key(
        None, "end the run at this step with a checkpoint; schedules do not change"
    )


@dataclass
class SamplingConfig:
    """The images that the sampling script and the demo page make."""

    num_fid_samples: PositiveInt = key(50_000, "images in the npz")
    class_labels: list[str] | None = key(
        None, "classes to sample, alternating: ids or names (a number is an id); null: all in order"
    )
    images_per_class: PositiveInt | None = key(None, "images of each class, instead of num_fid_samples in all")
    per_gpu_batch_size: Silent[PositiveInt] = key(50, "images per rank and batch")
    seed: Seed = key(42, "image i depends on (weights, config, seed, i) only")
    order: Literal["raster", "random"] = key(
        "raster", "order of the tokens; random: for models trained in random orders"
    )
    uint8_rule: Literal["truncate", "round"] = key(
        "truncate", "conversion of pixels to uint8; the published code truncates"
    )
    compile: Literal["auto", "on", "off"] = key("auto", "compile decoding (with CUDA graphs on CUDA); auto: on CUDA")
    mixed_precision: Literal["auto", "bf16", "no"] = key(
        "auto", "bf16 (on CUDA the image decoder in fp16) or no (float32); auto: bf16 on CUDA"
    )
    save_png: bool = key(False, "also write each image to <output_dir>.images/")


@dataclass
class Config:
    experiment: ExperimentConfig = section(ExperimentConfig)
    model: ModelConfig = section(ModelConfig)
    dataset: DatasetConfig = section(DatasetConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = section(LRSchedulerConfig)
    training: TrainingConfig = section(TrainingConfig)
    sampling: SamplingConfig = section(SamplingConfig)
