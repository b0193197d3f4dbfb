"""The config schema: every key, its default and, behind it, what it means.

Key names are those of the RAR / TiTok / reAR family, so that its YAML files load unchanged. Steps are optimizer
steps. `utils.config.load_config` fills this schema from YAML and the command line.
"""

from dataclasses import dataclass, field

from omegaconf import II, MISSING


@dataclass
class ExperimentConfig:
    project: str = "rear"  # wandb project
    name: str = "rear"  # wandb run name
    entity: str | None = None  # wandb entity (user or team); null: wandb's default
    output_dir: str = MISSING  # run folder; the sampler writes <output_dir>.npz
    max_train_examples: int = 1_281_167  # images in one epoch, to tell epochs in images (ten crops count once)
    save_every: int = 50_000  # steps between checkpoints
    keep_last: int = 2  # newest checkpoints that are kept (at least 2)
    keep_every: int = 0  # checkpoints at multiples of this step are kept for good; 0: none
    max_save_failures: int = 3  # end the run after this many failed saves in a row
    generate_every: int = 5_000  # steps between sample grids
    log_every: int = 50  # steps between log lines
    log_grad_norm_every: int = 1_000  # steps between logged gradient norms
    init_from: str | None = None  # fine-tuning: start from these weights, as generator_checkpoint, with new classes
    resume: str = "auto"  # auto: continue if there is a checkpoint; true: there must be one; false: none; or a path
    tokenizer_checkpoint: str = "maskgit-vqgan-imagenet-f16-256.bin"  # .bin, .safetensors or hf://OWNER/REPO/FILE
    generator_checkpoint: str | None = None  # to sample from: a file (or hf://...), checkpoint or run folder


@dataclass
class VQModelConfig:
    model_type: str = "maskgit_vq"  # the only tokenizer so far
    codebook_size: int = 1024  # V, number of codes
    token_size: int = 256  # width of a codebook vector
    num_latent_tokens: int = 256  # N, codes per image
    resolution: int = 256  # image height and width in pixels
    hidden_channels: int = 128  # channels of the first level
    channel_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])  # per level; each but one halves the size
    num_res_blocks: int = 2  # residual blocks per level


@dataclass
class GeneratorConfig:
    hidden_size: int = 768  # D
    num_hidden_layers: int = 24  # blocks
    num_attention_heads: int = 16  # heads
    intermediate_size: int = 3072  # MLP width
    dropout: float = 0.1  # after attention projection and in the MLP
    attn_drop: float = 0.1  # on attention probabilities
    class_label_dropout: float = 0.1  # probability of the null class in training
    image_seq_len: int = 256  # N, codes per image
    condition_num_classes: int = 1000  # C; class id C is the null class
    randomize_temperature: float = 1.0  # sampling temperature
    guidance_scale: float = 14.5  # g of power-cosine guidance; 1 switches guidance off
    guidance_scale_pow: float = 2.25  # exponent of power-cosine guidance
    top_k: int = 0  # sample from the k likeliest codes; 0: from all
    top_p: float = 1.0  # sample from the smallest set of codes with this probability; 1: from all
    use_checkpoint: bool = False  # activation checkpointing: less memory, about a third more time
    perturb_mode: str = "switch"  # noised context: switch (random codes), mask (the mask token) or none
    randomness_anneal_start: int = 0  # step at which the largest noise ratio starts to fall from 1
    randomness_anneal_end: int = 187_500  # step from which on it is 0
    transition_alignment: bool = True  # the embedding regularization as a whole
    transition_alignment_weight: float = 1.0  # lambda
    encode_align: bool = True  # the encode term: recover the embedding of the current code
    decode_align: bool = True  # the decode term: predict the embedding of the next code
    encode_align_layer_idx: int = 0  # block (from 0) whose output the encode term reads
    decode_align_layer_idx: int = 18  # block (from 0) whose output the decode term reads
    mask_perturbed_encode: bool = True  # encode term only at clean positions (released code); false: at all (paper)
    projection_dim: int = 2048  # hidden width of the projectors
    z_dim: int = 256  # output width of the projectors: the tokenizer's token_size


@dataclass
class ModelConfig:
    vq_model: VQModelConfig = field(default_factory=VQModelConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)


@dataclass
class DatasetParams:
    pretokenization: str | None = None  # codes: a .jsonl (converted once beside itself) or a .tokens store
    train_shards_path_or_url: str | None = None  # images: tar shards ("a-{000..252}.tar", glob) or a folder per class
    eval_shards_path_or_url: str | None = None  # held-out images, in the same forms
    num_workers_per_gpu: int = 12  # data loader processes per rank; 0: in the main process
    on_bad_sample: str = "error"  # bad lines of a jsonl, images in training that cannot be decoded: error or skip
    max_bad_fraction: float = 0.001  # with skip: more bad lines or images than this share of all are an error
    verify_hashes: bool = False  # read all codes at the start and compare them with the store's hashes


@dataclass
class PreprocessingConfig:
    resize_shorter_edge: int = 256  # pixels, before the crop
    crop_size: int = 256  # pixels
    random_crop: bool = False  # images read while training: random instead of centre crop
    random_flip: bool = True  # images read while training: mirror every second one
    pretokenize_crops: str = "ten_crop"  # per image when pre-tokenizing: center (1), center_flip (2) or ten_crop (10)


@dataclass
class DatasetConfig:
    params: DatasetParams = field(default_factory=DatasetParams)
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)


@dataclass
class OptimizerParams:
    learning_rate: float = 4e-4  # peak learning rate
    beta1: float = 0.9
    beta2: float = 0.96
    weight_decay: float = 0.03  # not on biases, norms, embeddings and 1-D parameters


@dataclass
class OptimizerConfig:
    name: str = "adamw"  # the only optimizer so far
    params: OptimizerParams = field(default_factory=OptimizerParams)


@dataclass
class LRSchedulerParams:
    learning_rate: float = II("optimizer.params.learning_rate")  # peak; must equal the optimizer's
    warmup_steps: int = 62_500  # steps of linear warm-up from 0
    end_lr: float = 1e-5  # learning rate at max_train_steps


@dataclass
class LRSchedulerConfig:
    scheduler: str = "cosine"  # linear warm-up, then cosine to end_lr; the only schedule so far
    params: LRSchedulerParams = field(default_factory=LRSchedulerParams)


@dataclass
class TrainingConfig:
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step; derived if global_batch_size is given
    global_batch_size: int | None = None  # images per optimizer step, whatever the number of processes; null: product
    allow_batch_change: bool = False  # continue a checkpoint that was written at another global batch
    per_gpu_batch_size: int = 256  # images per rank and micro-batch
    mixed_precision: str = "bf16"  # bf16 (autocast) or no (fp32)
    enable_tf32: bool = True  # TF32 matrix products on NVIDIA GPUs
    enable_wandb: bool = True  # log to wandb too; metrics.jsonl is written in any case
    use_ema: bool = False  # keep an exponential moving average of the weights and sample from it
    ema_decay: float = 0.9999  # of the EMA, per optimizer step
    seed: int = 42  # of initialisation, data order and all training noise
    max_train_steps: int = 250_000  # length of the schedules and of the run
    max_grad_norm: float = 1.0  # gradient clipping
    max_nonfinite_steps: int = 5  # end the run after this many steps in a row with a loss or gradient not finite
    launch_timeout: int = 120  # seconds in which all processes must have met
    process_group_timeout: int = 600  # seconds after which a rank that does not answer is taken for dead
    fsdp: bool = False  # shard parameters, gradients and optimizer state over all processes (FSDP2); without EMA
    stop_steps: int | None = None  # end the run at this step with a checkpoint, schedules unchanged


@dataclass
class VQTrainingConfig:
    init_from: str | None = None  # tokenizer weights to start from; null: from scratch
    commitment_weight: float = 0.25  # beta of the VQ-VAE loss
    l2_weight: float = 1.0  # of the squared error, beside the absolute error with weight 1
    perceptual_weight: float = 0.1  # of the distance between EfficientNet-Lite0 features
    adversarial_weight: float = 0.0  # of a discriminator's judgement of these features; 0: without a discriminator
    revive_every: int = 100  # steps between revivals of codes that were not used since the last one


@dataclass
class SamplingConfig:
    num_fid_samples: int = 50_000  # images in the npz
    per_gpu_batch_size: int = 50  # images per rank and batch
    seed: int = 42  # image i depends on (weights, config, seed, i) only
    uint8_rule: str = "truncate"  # float to uint8: truncate (the original) or round
    compile: str = "auto"  # the decode step compiled and as a CUDA graph: auto (on CUDA, if that works), on or off
    mixed_precision: str = "auto"  # bf16 (generator; the decoder on CUDA in fp16), no (fp32) or auto: bf16 on CUDA
    save_png: bool = False  # also write each image to <output_dir>.images/


@dataclass
class InspectionConfig:
    rows: list[int] | None = None  # of the codes, to decode; null: random ones
    num_images: int = 40  # random rows


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
