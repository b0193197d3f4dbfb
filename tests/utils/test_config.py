import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from utils.config import load_config, load_config_or_exit, save_config, to_yaml
from utils.config_checks import ConfigError, check_training
from utils.keys import KEYS, Key, keys_under
from utils.marks import MAY_CHANGE, SILENT, Follows, Range
from utils.schema import Config

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
        (["training.seed=abc"], "training.seed=abc: expected a whole number"),
        (["training.max_train_steps=1e3"], "training.max_train_steps=1e3: expected a whole number"),
        (["training.use_ema=2.5"], "training.use_ema=2.5: expected true or false"),
        (["inspection.rows=3"], "inspection.rows=3: expected a list of whole numbers or null"),
        (["sweep.guidance_scale=[1,x]"], "sweep.guidance_scale=x: expected a list of numbers"),
        (["inspection.rows=[0,-1]"], "inspection.rows=[0, -1]: expected at least 0"),
        (["model.vq_model.channel_mult=[]"], "model.vq_model.channel_mult=[]: expected at least one value"),
        (["model.vq_model.resolution=8"], "resolution=8: expected a multiple of 16 (5 levels in channel_mult)"),
        (
            ["training.mixed_precision=bf32"],
            "=bf32: expected one of auto, bf16, no; did you mean 'bf16'",
        ),
        (["sampling.compile=yes please"], "sampling.compile=yes please: expected one of auto, on, off"),
        (["sampling.mixed_precision=fp16"], "sampling.mixed_precision=fp16: expected one of auto, bf16, no"),
        (["model.generator.num_attention_heads=7"], "hidden_size=768: expected a multiple of num_attention_heads=7"),
        (["model.generator.decode_align_layer_idx=24"], "decode_align_layer_idx=24: expected 0 to 23"),
        (["lr_scheduler.params.learning_rate=1"], "=1.0: expected optimizer.params.learning_rate=0.0004"),
        (["training.per_gpu_batch_size=0"], "training.per_gpu_batch_size=0: expected at least 1"),
        (["vq_training.revive_every=0"], "vq_training.revive_every=0: expected at least 1"),
        (["model.generator.num_attention_heads=0"], "model.generator.num_attention_heads=0: expected at least 1"),
        (
            ["sampling.seed=18446744073709551615"],
            "sampling.seed=18446744073709551615: expected 0 to 9223372036854775807",
        ),
        (["training.max_grad_norm=0"], "training.max_grad_norm=0.0: expected above 0"),
        (["training.ema_decay=nan"], "training.ema_decay=nan: expected a finite number"),
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
    path.write_text("experiment: {resume: off}\n")
    assert load_config([f"config={path}", OUT]).experiment.resume == "false"
    path.write_text("sampling:\n  compile: off\n  mixed_precision: no\n")
    sampling = load_config([f"config={path}", OUT]).sampling
    assert (sampling.compile, sampling.mixed_precision) == ("off", "no")
    assert load_config(["sampling.compile=on", OUT]).sampling.compile == "on"


def test_keys_that_published_files_hold_and_nothing_reads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "published.yaml"
    path.write_text(
        "experiment: {log_grad_norm_every: 1_000, output_dir: x, save_every: 50_000}\n"
        "model:\n  vq_model: {finetune_decoder: False, pretrained_tokenizer_weight: a.bin}\n"
        "  generator: {kv_cache: True, randomness_anneal_end: 187_500}\n"
        "optimizer: {name: adamw, params: {learning_rate: 4e-4}}\n"
        "lr_scheduler: {params: {learning_rate: '${optimizer.params.learning_rate}', end_lr: 1e-5}}\n"
    )
    config = load_config([f"config={path}"])
    assert config.lr_scheduler.params.learning_rate == 4e-4
    notices = capsys.readouterr().err.splitlines()
    assert len(notices) == 4
    assert f"{path}: experiment.log_grad_norm_every has no effect and is ignored" in notices
    assert load_config([OUT, "model.vq_model.entropy_loss_weight=0.1"]) == load_config([OUT])
    with pytest.raises(ConfigError, match=r"unknown key .*did you mean 'vq_training\.entropy_weight'"):
        load_config([OUT, "vq_training.entropy_loss_weight=0.1"])


PUBLISHED_KEYS = {
    "experiment": "project name entity output_dir max_train_examples save_every generate_every log_every eval_every "
    "resume tokenizer_checkpoint generator_checkpoint",
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


def test_text_of_the_command_line_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for text in ("exp #2", "2026_11_25", "0123", "12:30", "1e5", "[a]", "{0..3}", "true", "a: b"):
        assert load_config([f"experiment.output_dir={text}"]).experiment.output_dir == text
    assert load_config(["experiment.output_dir=~/x"]).experiment.output_dir == "/home/me/x"
    assert load_config([OUT, "experiment.init_from=null"]).experiment.init_from is None
    (tmp_path / "a.yaml").write_text("experiment: {name: 2026_11_25}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: experiment\.name=20261125: expected text; put it in quotes"):
        load_config([f"config={tmp_path / 'a.yaml'}", OUT])


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.name)
def test_every_key_has_a_meaning_and_every_number_a_range(key: Key) -> None:
    assert key.meaning
    assert key.kind
    kinds = {key.type, *getattr(key.type, "__args__", ())}
    lists = kinds & {list[int], list[float]}
    if not lists and not kinds & {int, float}:
        return
    allowed = key.mark(Range)
    numbers = ["nan", "inf", "-inf"] if kinds & {float, list[float]} else []
    numbers += [allowed.at_least - 1 if allowed.at_least > float("-inf") else allowed.above]
    numbers += [bound for bound in (allowed.at_most + 1, allowed.below) if bound < float("inf")]
    for number in numbers:
        value = f"[{number}]" if lists else number
        with pytest.raises(ConfigError, match=rf"^{key.name}=\[?{number}(\.0)?\]?: expected "):
            load_config([OUT, f"{key.name}={value}"])


def test_sizes_follow_and_must_agree_where_they_are_read() -> None:
    arguments = [OUT, "model.vq_model.resolution=64", "model.vq_model.channel_mult=[1,2]"]
    arguments += ["model.vq_model.token_size=8", "optimizer.params.learning_rate=1e-3"]
    config = load_config(arguments)
    assert (config.model.vq_model.num_latent_tokens, config.model.generator.image_seq_len) == (1024, 1024)
    preprocessing = config.dataset.preprocessing
    assert (config.model.generator.z_dim, preprocessing.crop_size, preprocessing.resize_shorter_edge) == (8, 64, 64)
    assert config.lr_scheduler.params.learning_rate == 1e-3
    agreeing = ["model.vq_model.num_latent_tokens=1024", "model.generator.image_seq_len=1024"]
    assert load_config([*arguments, *agreeing, "dataset.preprocessing.crop_size=64"]) == config
    assert load_config([*arguments, "dataset.preprocessing.resize_shorter_edge=80"])
    for wrong, message in (
        ("model.vq_model.num_latent_tokens=9", "expected (resolution / 2^(levels - 1))^2=1024"),
        ("model.generator.image_seq_len=9", "expected model.vq_model.num_latent_tokens=1024"),
        ("model.generator.z_dim=9", "expected model.vq_model.token_size=8"),
        ("dataset.preprocessing.crop_size=9", "expected model.vq_model.resolution=64"),
    ):
        with pytest.raises(ConfigError) as error:
            load_config([*arguments, wrong])
        assert str(error.value) == f"{wrong}: {message}"
        assert load_config([*arguments, wrong], reads=["optimizer", "experiment"])


def test_defaults_from_python_are_those_of_an_empty_file() -> None:
    config = Config()
    config.experiment.output_dir = "out"
    assert load_config([OUT]) == config


def test_what_may_change_in_a_run_is_marked_beside_the_key() -> None:
    model = [key.name.rsplit(".", 1)[-1] for key in keys_under(["model"]) if MAY_CHANGE in key.marks]
    assert {"guidance_scale", "dropout", "use_checkpoint"} <= set(model)
    assert not {"hidden_size", "z_dim", "codebook_size", "transition_alignment"} & set(model)
    assert SILENT in KEYS["experiment.output_dir"].marks
    assert SILENT not in KEYS["training.seed"].marks


def test_the_published_place_of_a_config_is_understood(capsys: pytest.CaptureFixture) -> None:
    published = ROOT / "configs/training/generator/rear_l.yaml"
    assert load_config([f"config={published}", OUT]) == load_config([f"config={ROOT / 'configs/rear_l.yaml'}", OUT])
    assert capsys.readouterr().err == f"config={published}: no such file, {ROOT / 'configs/rear_l.yaml'} is used\n"
    with pytest.raises(ConfigError, match=r"generator/absent\.yaml: no such file"):
        load_config([f"config={published.with_name('absent.yaml')}", OUT])


def test_a_guidance_of_0_is_none(capsys: pytest.CaptureFixture) -> None:
    load_config([OUT, "model.generator.guidance_scale=0"])
    assert capsys.readouterr().err == "model.generator.guidance_scale=0 is taken as 1: without guidance, as published\n"


def test_a_run_cannot_stop_after_its_end() -> None:
    arguments = [OUT, "training.max_train_steps=10"]
    check_training(load_config([*arguments, "training.stop_steps=10"]))
    with pytest.raises(ConfigError, match=r"stop_steps=11: expected at most max_train_steps=10"):
        check_training(load_config([*arguments, "training.stop_steps=11"]))


def test_sharded_blocks_are_not_compiled() -> None:
    check_training(load_config([OUT, "training.fsdp=true"]))
    with pytest.raises(ConfigError, match=r"training.compile=on: expected auto or off, as training.fsdp=true"):
        check_training(load_config([OUT, "training.fsdp=true", "training.compile=on"]))


def test_the_project_s_own_configs_are_suggested_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"did you mean '{ROOT}/configs/rear_b.yaml'"):
        load_config(["config=configs/rear_b.yaml", OUT])


def test_keys_are_printed(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    result = subprocess.run([sys.executable, "-m", "utils.config", "--keys"], cwd=ROOT, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert [line.split("=")[0] for line in lines] == [*KEYS]
    assert "model.generator.top_k=0  " in result.stdout
    row = next(line for line in lines if line.startswith("model.generator.z_dim="))
    assert row.split(maxsplit=1) == [
        "model.generator.z_dim=256",
        "at least 1                output width of the projectors; by default model.vq_model.token_size",
    ]
    monkeypatch.setattr(sys, "argv", ["script.py", "training.seed=1", "--help"])
    with pytest.raises(SystemExit) as end:
        load_config_or_exit("What it does.", ["sampling", "-sampling.seed"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("What it does.\n")
    assert "sampling.compile=auto" in printed
    assert "sampling.seed" not in printed
    assert "training." not in printed


CONFIGS = sorted({*(ROOT / "configs").glob("*.yaml")} - {ROOT / "configs/published_results.yaml"})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_load(path: Path) -> None:
    load_config([f"config={path}", OUT])


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
    """But for those with one choice so far, and those that others follow."""
    folders = ("modeling", "data", "evaluation", "scripts", "utils")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(path.read_text() for path in files if path.name != "schema.py")
    followed = {key.mark(Follows).source for key in KEYS.values() if key.mark(Follows)}
    names = [name for name, key in KEYS.items() if len(key.choices) != 1 and name not in followed]
    assert [name for name in names if f".{name.rsplit('.', 1)[-1]}" not in code] == []
