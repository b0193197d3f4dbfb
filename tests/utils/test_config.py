import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from utils.config import ConfigError, check_tokenizer_fits, load_config, save_config, to_yaml

ROOT = Path(__file__).parents[2]
OUT = "experiment.output_dir=out"


def test_defaults_then_yaml_then_command_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("training: {seed: 1, max_grad_norm: 2.0}\nexperiment: {output_dir: from_yaml}\n")
    config = load_config([f"config={path}", "training.seed=2"])
    assert (config.training.seed, config.training.max_grad_norm) == (2, 2.0)
    assert config.experiment.output_dir == "from_yaml"
    assert config.training.max_train_steps == 250_000


def test_a_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config([OUT, "training.mixed_precision=no", "model.vq_model.channel_mult=[1,2]"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config([f"config={tmp_path / 'config.yaml'}"]) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["training.per_gpu_batchsize=4"],
            "'training.per_gpu_batchsize'; did you mean 'training.per_gpu_batch_size'",
        ),
        (["trainig.seed=4"], "unknown key 'trainig.seed'; did you mean 'training.seed'"),
        (["training.output_dir=4"], "did you mean 'experiment.output_dir'"),
        (["training.seed=abc"], "training.seed: Value 'abc' of type 'str' could not be converted to Integer"),
        (
            ["training.mixed_precision=bf32"],
            "=bf32: expected one of bf16, no; did you mean 'bf16'",
        ),
        (["sampling.compile=yes please"], "sampling.compile=yes please: expected one of auto, on, off"),
        (["sampling.mixed_precision=fp16"], "sampling.mixed_precision=fp16: expected one of auto, bf16, no"),
        (["model.generator.num_attention_heads=7"], "hidden_size=768: expected a multiple of num_attention_heads=7"),
        (["model.generator.decode_align_layer_idx=24"], "decode_align_layer_idx=24: expected 0 to 23"),
        (["lr_scheduler.params.learning_rate=1"], "lr_scheduler.params.learning_rate=1.0: expected the optimizer's"),
        (["training.per_gpu_batch_size=0"], "training.per_gpu_batch_size=0: expected at least 1"),
        (["vq_training.revive_every=0"], "vq_training.revive_every=0: expected at least 1"),
        (["vq_training.adversarial_weight=-1"], "vq_training.adversarial_weight=-1.0: expected at least 0"),
        (["seed"], "'seed' is not of the form key=value"),
        (
            ["config=configs/rear_bb.yaml"],
            "rear_bb.yaml: no such file; did you mean 'configs/rear_b.yaml'",
        ),
    ],
)
def test_errors_are_one_line_with_key_found_and_expected(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config([OUT, *arguments])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {seed: 1}\ntraining: {seed: 2}\n", "line 2: found duplicate key training"),
        ("training: {sed: 1}\n", "unknown key 'training.sed'; did you mean 'training.seed'"),
        ("- a\n", "expected a mapping of sections, found a ListConfig"),
        ("training: {seed: [1\n", "line 2"),
        ("training: 3\n", "training"),
    ],
)
def test_yaml_errors_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config([f"config={path}", OUT])
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"experiment\.output_dir: missing value"):
        load_config([])


def test_a_bare_no_means_the_word(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("training:\n  mixed_precision: no\n")
    assert load_config([f"config={path}", OUT]).training.mixed_precision == "no"
    assert load_config(["training.mixed_precision=no", OUT]).training.mixed_precision == "no"
    assert load_config(["experiment.resume=True", OUT]).experiment.resume == "true"
    path.write_text("sampling:\n  compile: off\n  mixed_precision: no\n")
    sampling = load_config([f"config={path}", OUT]).sampling
    assert (sampling.compile, sampling.mixed_precision) == ("off", "no")
    assert load_config(["sampling.compile=on", OUT]).sampling.compile == "on"


def test_keys_that_published_files_hold_and_nothing_reads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "published.yaml"
    path.write_text(
        "experiment: {eval_every: 50_000, output_dir: x, save_every: 50_000}\n"
        "model:\n  vq_model: {finetune_decoder: False, pretrained_tokenizer_weight: a.bin}\n"
        "  generator: {kv_cache: True, randomness_anneal_end: 187_500}\n"
        "optimizer: {name: adamw, params: {learning_rate: 4e-4}}\n"
        "lr_scheduler: {params: {learning_rate: '${optimizer.params.learning_rate}', end_lr: 1e-5}}\n"
    )
    config = load_config([f"config={path}"])
    assert config.lr_scheduler.params.learning_rate == 4e-4
    notices = capsys.readouterr().err.splitlines()
    assert len(notices) == 4
    assert f"{path}: experiment.eval_every has no effect and is ignored" in notices


PUBLISHED_KEYS = {
    "experiment": "project name entity output_dir max_train_examples save_every generate_every log_every "
    "log_grad_norm_every resume tokenizer_checkpoint generator_checkpoint",
    "model.vq_model": "model_type codebook_size token_size num_latent_tokens",
    "model.generator": "hidden_size num_hidden_layers num_attention_heads intermediate_size dropout attn_drop "
    "class_label_dropout image_seq_len condition_num_classes randomize_temperature guidance_scale guidance_scale_pow "
    "use_checkpoint perturb_mode randomness_anneal_start randomness_anneal_end transition_alignment "
    "transition_alignment_weight encode_align decode_align encode_align_layer_idx decode_align_layer_idx "
    "projection_dim z_dim",
    "dataset.params": "pretokenization train_shards_path_or_url eval_shards_path_or_url num_workers_per_gpu",
    "dataset.preprocessing": "resize_shorter_edge crop_size random_crop random_flip",
    "optimizer": "name",
    "optimizer.params": "learning_rate beta1 beta2 weight_decay",
    "lr_scheduler": "scheduler",
    "lr_scheduler.params": "learning_rate warmup_steps end_lr",
    "training": "gradient_accumulation_steps per_gpu_batch_size mixed_precision enable_tf32 enable_wandb use_ema seed "
    "max_train_steps max_grad_norm stop_steps",
}


def test_the_family_s_keys_are_the_schema_s(tmp_path: Path) -> None:
    """A YAML file with every key of the published ones loads; the values are those of a default config."""
    defaults = OmegaConf.create(to_yaml(load_config([OUT])))
    published = OmegaConf.create()
    for section, names in PUBLISHED_KEYS.items():
        for name in names.split():
            OmegaConf.update(published, f"{section}.{name}", OmegaConf.select(defaults, f"{section}.{name}"))
    OmegaConf.save(published, tmp_path / "published.yaml")
    assert load_config([f"config={tmp_path / 'published.yaml'}"]) == load_config([OUT])


def test_tokenizer_and_generator_must_fit() -> None:
    check_tokenizer_fits(load_config([OUT]))
    for wrong in ("model.vq_model.resolution=128", "model.generator.image_seq_len=64", "model.generator.z_dim=8"):
        with pytest.raises(ConfigError, match="expected"):
            check_tokenizer_fits(load_config([OUT, wrong]))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path: Path) -> None:
    config = load_config([f"config={path}", OUT])
    if not path.name.startswith("tokenizer_"):  # those have no generator
        check_tokenizer_fits(config)


@pytest.mark.parametrize(
    "script", ["train_rear", "sample_imagenet_rear", "pretokenize", "train_tokenizer", "reconstruct", "inspect_codes"]
)
def test_a_typo_ends_a_script_at_once(script: str, tmp_path: Path) -> None:
    """Before torch is imported: the import hook makes that an error."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{script}.py", OUT, "training.per_gpu_batchsize=4"],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0
    assert "did you mean" in result.stderr


def test_every_key_is_read_somewhere() -> None:
    folders = ("modeling", "data", "evaluation", "scripts", "utils")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(path.read_text() for path in files if path.name != "schema.py")
    config = to_yaml(load_config([OUT]))
    leaves = {line.split(":")[0].strip() for line in config.splitlines() if not line.strip().startswith("-")}
    assert {leaf for leaf in leaves if f".{leaf}" not in code} == set()
