"""The config schema, one line per key: its type with range or choices, its default and, behind it, what it means.

A new key is one such line, and nothing else but the code that reads it: `python -m utils.config --keys` and the --help
of the scripts print what stands here. `utils.marks` explains the marks within `Annotated[...]`. Mark a key of the
section model with MayChange if a run may be continued with another value of it; without a mark that is refused.

Key names are those of the RAR / TiTok / reAR family, so that its YAML files load unchanged. Steps are of the optimizer.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from omegaconf import MISSING

from utils.marks import (
    Count,
    Follows,
    MayChange,
    NumberFrom0,
    Positive,
    Range,
    Seed,
    Share,
    ShareBelow1,
    Silent,
    Weight,
    Words,
)

# Kinds of tokenizers whose num_latent_tokens is given, for it does not follow from resolution and channel_mult.
OWN_NUMBER_OF_CODES = ("titok", "codes_only")
GRID = "(resolution / 2^(levels - 1))^2"
GRID_INTERPOLATION = "${codes_per_image:${model.vq_model.resolution},${model.vq_model.channel_mult}}"


@dataclass
class ExperimentConfig:
    project: Silent[str] = "rear"  # wandb project
    name: Silent[str] = "rear"  # wandb run name
    entity: Silent[str | None] = None  # wandb entity (user or team); null: wandb's default
    group: Silent[str | None] = None  # wandb group, under which runs of one study stand together
    tags: Silent[list[str]] = field(default_factory=list)  # wandb tags
    output_dir: Silent[str] = MISSING  # run folder; the sampler writes <output_dir>.npz
    max_train_examples: Count = 1_281_167  # images in one epoch, to tell epochs in images (ten crops count once)
    save_every: Silent[Count] = 50_000  # steps between checkpoints
    keep_last: Silent[Annotated[int, Range(at_least=2)]] = 2  # newest checkpoints that are kept
    keep_every: Silent[NumberFrom0] = 0  # checkpoints at multiples of this step are kept for good; 0: none
    save_weights_every: Silent[NumberFrom0] = 0  # steps between weights alone, kept for good; 0: none
    max_save_failures: Silent[Count] = 3  # end the run after this many failed saves in a row
    generate_every: Silent[Count] = 5_000  # steps between sample grids
    log_every: Silent[Count] = 50  # steps between log lines, each the mean of the steps since the last one
    eval_every: Silent[NumberFrom0] = 0  # steps between held-out losses (dataset.params.eval_...); 0: none
    # samples for a Frechet distance to the held-out images, with each held-out loss; 0: none
    eval_samples: Silent[NumberFrom0] = 0
    init_from: str | None = None  # fine-tuning: start from these weights, as generator_checkpoint, with new classes
    # auto: continue if there is a checkpoint; true: there must be one; false: none; or a path
    resume: Silent[Annotated[str, Words(("auto", "true", "false"))]] = "auto"
    tokenizer_checkpoint: Silent[str] = "ckpt/maskgitvq.bin"  # .bin, .safetensors or hf://OWNER/REPO/FILE
    allow_other_tokenizer: Silent[bool] = False  # sample or train on with another tokenizer than the weights remember
    generator_checkpoint: Silent[str | None] = None  # to sample from: a file (or hf://...), checkpoint or run folder


@dataclass
class VQModelConfig:
    # kind of tokenizer, told apart in docs/tokenizers.md
    model_type: Literal["maskgit_vq", "llamagen_vq", "taming_vqgan", "vqplus", "titok", "codes_only"] = "maskgit_vq"
    codebook_size: Count = 1024  # V, number of codes
    token_size: Count = 256  # width of a codebook vector
    # N, codes per image; titok and codes_only: to be given
    num_latent_tokens: Annotated[Count, Follows(GRID, GRID_INTERPOLATION, free_for=OWN_NUMBER_OF_CODES)] = 256
    resolution: Count = 256  # image height and width in pixels
    hidden_channels: Count = 128  # channels of the first level
    # per level; each but one halves the size
    channel_mult: Annotated[list[int], Range(at_least=1)] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    num_res_blocks: Count = 2  # residual blocks per level
    z_channels: Count = 256  # llamagen_vq, taming_vqgan: width before the 1x1 convolution to token_size
    # vqplus: lookup (nearest codebook vector) or lookup-free (the sign of each of token_size channels)
    quantizer_type: Literal["lookup", "lookup-free"] = "lookup"
    is_legacy: bool = True  # titok: to pixels through the codes of MaskGIT-VQ (L-32, B-64, S-128); false: straight
    # titok: features and codebook vectors of length 1 in the look-up
    use_l2_norm: Annotated[bool, Follows("model.vq_model.is_legacy", must_agree=False)] = True
    vit_enc_model_size: Literal["tiny", "small", "base", "large"] = "base"  # titok: the encoder; tiny: for tests
    vit_dec_model_size: Literal["tiny", "small", "base", "large"] = "base"  # titok: the decoder
    vit_enc_patch_size: Count = 16  # titok: pixels, height and width of a patch
    vit_dec_patch_size: Count = 16  # titok: the same of the decoder


@dataclass
class GeneratorConfig:
    hidden_size: Count = 768  # D, width of the blocks
    num_hidden_layers: Count = 24  # blocks, one after the other
    num_attention_heads: Count = 16  # heads of each block; they divide hidden_size
    intermediate_size: Count = 3072  # width within the MLPs
    dropout: MayChange[ShareBelow1] = 0.1  # after attention projection and in the MLP
    attn_drop: MayChange[ShareBelow1] = 0.1  # on attention probabilities
    class_label_dropout: MayChange[Share] = 0.1  # probability of the null class in training
    image_seq_len: Annotated[Count, Follows("model.vq_model.num_latent_tokens")] = 256  # N, codes per image
    condition_num_classes: Count = 1000  # C; class id C is the null class
    randomize_temperature: MayChange[Annotated[float, Range(at_least=1e-6)]] = 1.0  # sampling temperature
    # g of power-cosine guidance; 1: without guidance; 0: as 1, as in the published code
    guidance_scale: MayChange[Annotated[float, Range(at_least=0, at_most=1000)]] = 14.5
    guidance_scale_pow: MayChange[Weight] = 2.25  # exponent of power-cosine guidance; 0: constant guidance
    top_k: MayChange[NumberFrom0] = 0  # sample from the k likeliest codes; 0: from all
    # sample from the smallest set of codes with this probability; 1: from all
    top_p: MayChange[Annotated[float, Range(at_least=1e-6, at_most=1)]] = 1.0
    use_checkpoint: MayChange[bool] = False  # activation checkpointing: less memory, about a third more time
    # noised context: switch (random codes), mask (the mask token) or none
    perturb_mode: MayChange[Literal["switch", "mask", "none"]] = "switch"
    perturb_ratio_max: MayChange[Share] = 1.0  # largest share of codes that are replaced in a sequence, at the start
    perturb_ratio_fixed: MayChange[bool] = False  # that share in every sequence, instead of one drawn from U(0, it)
    randomness_anneal_start: MayChange[NumberFrom0] = 0  # step at which the largest share starts to fall
    randomness_anneal_end: MayChange[NumberFrom0] = 187_500  # step from which on it is 0
    # in which the codes are predicted while training: raster, random (another one for each sample at each step) or
    # annealed (that for a share of the samples, which falls to 0)
    order: MayChange[Literal["raster", "random", "annealed"]] = "raster"
    order_anneal_start: MayChange[NumberFrom0] = 125_000  # step at which the share starts to fall from 1
    order_anneal_end: MayChange[NumberFrom0] = 187_500  # step from which on it is 0
    transition_alignment: bool = True  # the embedding regularization as a whole; logged as train/proj_loss
    transition_alignment_weight: MayChange[Weight] = 1.0  # lambda, the weight of train/proj_loss
    encode_align: bool = True  # the encode term: recover the embedding of the current code
    decode_align: bool = True  # the decode term: predict the embedding of the next code
    encode_align_layer_idx: NumberFrom0 = 0  # block (from 0) whose output the encode term reads
    decode_align_layer_idx: NumberFrom0 = 18  # block (from 0) whose output the decode term reads
    # encode term only at clean positions (released code); false: at all (paper)
    mask_perturbed_encode: MayChange[bool] = True
    projection_dim: Count = 2048  # hidden width of the projectors
    z_dim: Annotated[Count, Follows("model.vq_model.token_size")] = 256  # output width of the projectors


@dataclass
class ModelConfig:
    vq_model: VQModelConfig = field(default_factory=VQModelConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)


@dataclass
class DatasetParams:
    pretokenization: str | None = None  # codes: a .jsonl (converted once beside itself) or a .tokens store
    train_shards_path_or_url: str | None = None  # images: tar shards ("a-{000..252}.tar", glob) or a folder per class
    eval_pretokenization: str | None = None  # held-out codes, in the same forms
    eval_shards_path_or_url: str | None = None  # held-out images, in the same forms
    # data loader processes per rank; 0: in the main process; null: 12 for images, 2 for codes, at most the CPUs
    num_workers_per_gpu: Silent[NumberFrom0 | None] = None
    # bad lines of a jsonl, images that cannot be read: end, or leave them out with a count
    on_bad_sample: Literal["error", "skip"] = "error"
    max_bad_fraction: Share = 0.001  # with skip: more bad lines or images than this share of all are an error
    verify_hashes: bool = False  # read all codes at the start and compare them with the store's hashes


@dataclass
class PreprocessingConfig:
    # pixels, before the crop
    resize_shorter_edge: Annotated[Count, Follows("dataset.preprocessing.crop_size", must_agree=False)] = 256
    crop_size: Annotated[Count, Follows("model.vq_model.resolution")] = 256  # pixels, height and width
    random_crop: bool = False  # images read while training: random instead of centre crop
    random_flip: bool = True  # images read while training: mirror every second one
    # per image when pre-tokenizing: center (1), center_flip (2) or ten_crop (10)
    pretokenize_crops: Literal["center", "center_flip", "ten_crop"] = "ten_crop"
    background: Literal["white", "grey", "black"] = "white"  # the colour behind transparent pixels
    exif_orientation: bool = False  # turn photos as their EXIF entry says; false: ignore it, as ADM does


@dataclass
class DatasetConfig:
    params: DatasetParams = field(default_factory=DatasetParams)
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)


@dataclass
class OptimizerParams:
    learning_rate: Positive = 4e-4  # peak learning rate
    beta1: ShareBelow1 = 0.9  # of AdamW: decay of the mean of the gradients
    beta2: ShareBelow1 = 0.96  # of AdamW: decay of the mean of their squares
    weight_decay: Weight = 0.03  # not on biases, norms, embeddings and 1-D parameters
    momentum: ShareBelow1 = 0.95  # of Muon


@dataclass
class ParamGroupConfig:
    pattern: str  # regular expression, searched for in the names of parameters
    lr_factor: Weight = 1.0  # learning rate as a multiple of the schedule's
    weight_decay: Weight | None = None  # null: as without the group


@dataclass
class OptimizerConfig:
    # adamw: decoupled weight decay; muon: Muon for the matrices of the blocks and AdamW for the rest (torch >= 2.9)
    name: Literal["adamw", "muon"] = "adamw"
    params: OptimizerParams = field(default_factory=OptimizerParams)
    # [{pattern: REGEX, lr_factor: 1.0, weight_decay: null}, ...]: the first pattern found in its name sets a parameter
    param_groups: list[ParamGroupConfig] = field(default_factory=list)


@dataclass
class LRSchedulerParams:
    learning_rate: Annotated[Positive, Follows("optimizer.params.learning_rate")] = 4e-4  # peak, the optimizer's
    warmup_steps: NumberFrom0 = 62_500  # steps of linear warm-up from 0
    end_lr: Weight = 1e-5  # learning rate at max_train_steps


@dataclass
class LRSchedulerConfig:
    scheduler: Literal["cosine"] = "cosine"  # linear warm-up, then cosine to end_lr
    params: LRSchedulerParams = field(default_factory=LRSchedulerParams)


@dataclass
class TrainingConfig:
    gradient_accumulation_steps: Silent[Count] = 1  # micro-batches per step; derived if global_batch_size is given
    global_batch_size: Silent[Count | None] = None  # images per step, whatever the number of processes; null: product
    allow_batch_change: Silent[bool] = False  # continue a checkpoint that was written at another global batch
    per_gpu_batch_size: Silent[Count] = 256  # images per rank and micro-batch
    # bf16 (autocast) or no (fp32); auto: bf16 on CUDA, for few CPUs are fast at it
    mixed_precision: Literal["auto", "bf16", "no"] = "auto"
    # the blocks compiled; auto: on CUDA, unless sharded; a CPU takes about a minute for it
    compile: Literal["auto", "on", "off"] = "auto"
    enable_tf32: bool = True  # TF32 matrix products on NVIDIA GPUs
    enable_wandb: Silent[bool] = True  # log to wandb too; metrics.jsonl is written in any case
    use_ema: bool = False  # keep an exponential moving average of the weights and sample from it
    ema_decay: ShareBelow1 = 0.9999  # of the EMA, per optimizer step
    seed: Seed = 42  # of initialisation, data order and all training noise
    max_train_steps: NumberFrom0 = 250_000  # length of the schedules and of the run
    max_grad_norm: Positive = 1.0  # gradients are scaled down to this norm; a very large number: never
    max_nonfinite_steps: Count = 5  # end the run after this many steps in a row with a loss or gradient not finite
    launch_timeout: Silent[Count] = 120  # seconds in which all processes must have met
    process_group_timeout: Silent[Count] = 600  # seconds after which a rank that does not answer is taken for dead
    fsdp: Silent[bool] = False  # shard parameters, gradients, optimizer state and EMA over all processes (FSDP2)
    # START:STOP: a trace of the steps from START to STOP - 1, counted from 0, in <output_dir>/profile/; null: none
    profile: Silent[str | None] = None
    deterministic: bool = False  # the same bits each time on a GPU too, slower
    stop_steps: Silent[NumberFrom0 | None] = None  # end the run at this step with a checkpoint, schedules unchanged


@dataclass
class VQTrainingConfig:
    init_from: str | None = None  # tokenizer weights to start from; null: from scratch
    commitment_weight: Weight = 0.25  # beta of the VQ-VAE loss
    entropy_weight: Weight = 0.0  # of each code's entropy minus that of their mean: more codes are used
    l2_weight: Weight = 1.0  # of the squared error, beside the absolute error with weight 1
    perceptual_weight: Weight = 0.1  # of the distance between EfficientNet-Lite0 features
    adversarial_weight: Weight = 0.0  # of a discriminator's judgement of these features; 0: without a discriminator
    revive_every: Count = 100  # steps between revivals of codes that were not used since the last one


@dataclass
class SamplingConfig:
    num_fid_samples: Count = 50_000  # images in the npz
    # classes in turns: ids, or names of classes of the training data (a number is an id); null: all in their order
    class_labels: list[str] | None = None
    images_per_class: Count | None = None  # so many of each, in place of num_fid_samples; null: num_fid_samples in all
    per_gpu_batch_size: Silent[Count] = 50  # images per rank and batch
    seed: Seed = 42  # image i depends on (weights, config, seed, i) only
    order: Literal["raster", "random"] = "raster"  # of the codes of an image; random: for models trained so
    uint8_rule: Literal["truncate", "round"] = "truncate"  # float to uint8: truncate (the original) or round
    compile: Literal["auto", "on", "off"] = "auto"  # the decode step compiled (CUDA: a graph); auto: on CUDA
    # bf16 (generator; the decoder on CUDA in fp16), no (fp32); auto: bf16 on CUDA
    mixed_precision: Literal["auto", "bf16", "no"] = "auto"
    save_png: bool = False  # also write each image to <output_dir>.images/


@dataclass
class InspectionConfig:
    rows: Annotated[list[int] | None, Range(at_least=0)] = None  # of the codes, to decode; null: random ones
    num_images: Count = 40  # random rows


@dataclass
class CompletionConfig:
    inputs: str | None = None  # images to complete: a folder of them, a folder per class, or tar shards
    # whose codes stay: top:SHARE, left:SHARE, center:SHARE (a square in the middle, of this share of each side),
    # border:SHARE (all but a square in the middle) or a square picture, white where they stay
    keep: str = "top:0.5"
    num_images: Count = 40  # the first ones of the inputs
    num_completions: Count = 3  # of each image; the k-th, from 0, depends on sampling.seed + k
    # of all images; null: the null class, which is without guidance
    class_label: Annotated[int | None, Range(at_least=0)] = None


@dataclass
class SweepConfig:
    reference: str | None = None  # npz of images: one half chooses the best setting, the other scores it
    # values of model.generator.guidance_scale; each with every other value below
    guidance_scale: Annotated[list[float], Range(0, 1000)] = field(default_factory=lambda: [1.0, 2.0, 4.0, 8.0])
    # values of model.generator.guidance_scale_pow; null: that one alone
    guidance_scale_pow: Annotated[list[float] | None, Range(at_least=0)] = None
    # values of model.generator.randomize_temperature; null: that one alone
    randomize_temperature: Annotated[list[float] | None, Range(at_least=1e-6)] = None


@dataclass
class DemoConfig:
    host: str = "127.0.0.1"  # address that the page listens on; 0.0.0.0: other machines reach it too
    port: Annotated[int, Range(1, 65_535)] = 7860  # of the page
    max_images: Count = 16  # that a click may ask for


@dataclass
class Config:
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    vq_training: VQTrainingConfig = field(default_factory=VQTrainingConfig)  # scripts/train_tokenizer.py only
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    inspection: InspectionConfig = field(default_factory=InspectionConfig)  # scripts/inspect_codes.py only
    completion: CompletionConfig = field(default_factory=CompletionConfig)  # scripts/complete_images.py only
    sweep: SweepConfig = field(default_factory=SweepConfig)  # scripts/sweep_guidance.py only
    demo: DemoConfig = field(default_factory=DemoConfig)  # scripts/demo.py only
