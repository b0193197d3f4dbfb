import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from scripts import complete_images, demo, inspect_codes, sweep_guidance, train_tokenizer
from utils.config import SCRIPT_SECTIONS, load_config, load_config_as, load_config_or_exit, save_config, to_yaml
from utils.config_checks import check_training
from utils.keys import MAY_CHANGE, SILENT, ConfigError, Key, keys_of, select
from utils.schema import Config

ROOT = Path(__file__).parents[2]
OUT = "experiment.output_dir=out"
KEYS = keys_of(Config)
SCRIPT_CONFIGS = {
    "vq_training": train_tokenizer.TrainTokenizerConfig,
    "inspection": inspect_codes.InspectCodesConfig,
    "completion": complete_images.CompleteImagesConfig,
    "sweep": sweep_guidance.SweepGuidanceConfig,
    "demo": demo.DemoScriptConfig,
}


def load_any(arguments: list[str]) -> Config:
    """With the section of a script if a key of it is given."""
    sections = [name for name in SCRIPT_CONFIGS if any(argument.startswith(f"{name}.") for argument in arguments)]
    return load_config_as(SCRIPT_CONFIGS[sections[0]] if sections else Config, arguments)


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
    ("arguments", "parts"),
    [
        (["training.per_gpu_batchsize=4"], ["'training.per_gpu_batchsize'", "'training.per_gpu_batch_size'"]),
        (["trainig.seed=4"], ["'trainig.seed'", "'training.seed'"]),
        (["training.output_dir=4"], ["'training.output_dir'", "'experiment.output_dir'"]),
        (["training.seed=abc"], ["command line: training.seed=abc: expected int"]),
        (["training.max_train_steps=1e3"], ["training.max_train_steps=1e3: expected int >= 0"]),
        (["training.use_ema=2.5"], ["training.use_ema=2.5: expected true | false"]),
        (["training.seed=[1]"], ["training.seed=[1]: expected int"]),
        (["training.seed=null"], ["training.seed=null: expected int"]),
        (["training.seed={a: 1}"], ["unknown key 'training.seed.a'"]),
        (["training.seed={}"], ["training.seed={}: expected int"]),
        (["training=3"], ["training is a section"]),
        (["inspection.rows=3"], ["inspection.rows=3: expected list of int >= 0 | null"]),
        (["sweep.guidance_scale=[1,x]"], ["sweep.guidance_scale=[1, x]: expected non-empty list of float"]),
        (["inspection.rows=[0,-1]"], ["inspection.rows=[0, -1]: expected list of int >= 0"]),
        (["model.vq_model.channel_mult=[]"], ["model.vq_model.channel_mult=[]: expected non-empty list"]),
        (["model.vq_model.resolution=8"], ["model.vq_model.resolution=8: expected a multiple of 16"]),
        (["training.mixed_precision=bf32"], ["training.mixed_precision=bf32: expected auto | bf16 | no", "'bf16'"]),
        (["sampling.compile=yes please"], ["sampling.compile=yes please: expected auto | on | off"]),
        (["model.generator.num_attention_heads=7"], ["hidden_size=768: expected", "num_attention_heads=7"]),
        (["model.generator.decode_align_layer_idx=24"], ["decode_align_layer_idx=24: expected 0 to 23"]),
        (["lr_scheduler.params.learning_rate=1"], ["=1.0: expected optimizer.params.learning_rate=0.0004"]),
        (["training.per_gpu_batch_size=0"], ["training.per_gpu_batch_size=0: expected int >= 1"]),
        (["vq_training.revive_every=0"], ["vq_training.revive_every=0: expected int >= 1"]),
        (["demo.port=65536"], ["demo.port=65536: expected int >= 1, <= 65535"]),
        (
            ["sampling.seed=18446744073709551615"],
            ["sampling.seed=18446744073709551615: expected int >= 0, <= 9223372036854775807"],
        ),
        (["training.max_grad_norm=0"], ["training.max_grad_norm=0: expected float > 0"]),
        (["training.ema_decay=nan"], ["training.ema_decay=nan: expected float >= 0, < 1"]),
        (["training.max_grad_norm=inf"], ["training.max_grad_norm=inf: expected float > 0"]),
        (["training.max_grad_norm=1e400"], ["training.max_grad_norm=1e400: expected float > 0"]),
        (["training.seed=${training.sed}"], ["training.seed"]),
        (["optimizer.params.learning_rate=${training.seed}", "lr_scheduler.params.learning_rate=1"], ["=42.0"]),
        (["seed"], ["'seed'", "key=value"]),
        (["config=configs/rear_bb.yaml"], ["rear_bb.yaml: no such file", "'configs/rear_b.yaml'"]),
        (["config=a.yaml", "config=b.yaml"], ["config="]),
    ],
)
def test_errors_are_one_line_with_key_found_and_expected(arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_any([OUT, *arguments])
    assert [part for part in parts if part not in str(error.value)] == [], str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {seed: 1}\ntraining: {seed: 2}\n", "line 2: found duplicate key training"),
        ("training: {sed: 1}\n", "unknown key 'training.sed'; did you mean 'training.seed'"),
        ("- a\n", "expected a mapping"),
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
    path.write_text("experiment: {resume: off}\ntraining: {use_ema: on, fsdp: Yes}\n")
    config = load_config([f"config={path}", OUT])
    assert (config.experiment.resume, config.training.use_ema, config.training.fsdp) == ("false", True, True)
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
        load_any([OUT, "vq_training.entropy_loss_weight=0.1"])


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
    (tmp_path / "a.yaml").write_text("experiment: {name: 2026_11_25, tags: [0123, no, 1e5], group: 12:30}\n")
    experiment = load_config([f"config={tmp_path / 'a.yaml'}", OUT]).experiment
    assert (experiment.name, experiment.tags, experiment.group) == ("2026_11_25", ["0123", "no", "1e5"], "12:30")


ALL_KEYS = KEYS | {name: key for one in SCRIPT_CONFIGS.values() for name, key in keys_of(one).items()}


def test_every_key_has_a_meaning_and_every_number_a_range() -> None:
    for key in ALL_KEYS.values():
        assert key.help
        if "int" in key.allowed or "float" in key.allowed:
            check_range(key)


def check_range(key: Key) -> None:
    signs = {">=": -1, ">": 0, "<=": 1, "<": 0}  # to the next number outside
    bounds = [(bound, signs[sign]) for sign, bound in re.findall(r"([<>]=?) (\S+?)(?=,|$| \|)", key.allowed)]
    assert bounds, key.allowed
    numbers = [str(int(bound) + step if "." not in bound and "e" not in bound else -1) for bound, step in bounds]
    for number in [*numbers, *(["nan", "inf", "-inf"] if "float" in key.allowed else [])]:
        value = f"[{number}]" if "list" in key.allowed else number
        with pytest.raises(ConfigError) as error:
            load_any([OUT, f"{key.name}={value}"])
        assert f"{key.name}={value}: expected {key.allowed}" in str(error.value)


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
        assert load_config([*arguments, wrong], reads={"optimizer": "all", "experiment": "output_dir"})


def test_values_that_refer_to_others(tmp_path: Path) -> None:
    """Also keys that are derived from them, or that they are derived from."""
    path = tmp_path / "a.yaml"
    path.write_text(
        "experiment: {name: b, output_dir: 'out/${experiment.name}'}\n"
        "model: {vq_model: {resolution: 64, token_size: '${model.vq_model.resolution}'}}\n"
        "dataset: {preprocessing: {resize_shorter_edge: '${dataset.preprocessing.crop_size}'}}\n"
        "optimizer: {params: {learning_rate: 4e-3}}\n"
        "lr_scheduler: {params: {learning_rate: '${optimizer.params.learning_rate}', end_lr: '${.learning_rate}'}}\n"
    )
    config = load_config([f"config={path}", "experiment.name=c"])
    assert config.experiment.output_dir == "out/c"
    assert (config.model.vq_model.token_size, config.model.generator.z_dim) == (64, 64)
    assert config.dataset.preprocessing.resize_shorter_edge == 64
    assert config.lr_scheduler.params.learning_rate == config.lr_scheduler.params.end_lr == 4e-3
    with pytest.raises(ConfigError, match=r"generator\.z_dim"):
        load_config([OUT, "model.generator.z_dim=${model.vq_model.token_sizes}"])


def test_defaults_from_python_are_those_of_an_empty_file() -> None:
    config = Config()
    config.experiment.output_dir = "out"
    assert load_config([OUT]) == config


def test_what_may_change_in_a_run_is_annotated() -> None:
    model = [key.name.rsplit(".", 1)[-1] for key in select(KEYS, {"model": "all"}) if key.has(MAY_CHANGE)]
    assert {"guidance_scale", "dropout", "use_checkpoint"} <= set(model)
    assert not {"hidden_size", "z_dim", "codebook_size", "transition_alignment"} & set(model)
    assert KEYS["experiment.output_dir"].has(SILENT)
    assert not KEYS["training.seed"].has(SILENT)


def test_sections_of_scripts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A script knows its own; the others accept them as they are, but no section that no script has."""
    assert {name: config.__module__ for name, config in SCRIPT_CONFIGS.items()} == {
        name: script.removesuffix(".py").replace("/", ".") for name, script in SCRIPT_SECTIONS.items()
    }
    path = tmp_path / "a.yaml"
    path.write_text("sweep: {guidance_scale: [2], typo: 1}\ndemo: {port: 1}\n")
    assert load_config([f"config={path}", OUT]) == load_config([OUT])
    assert load_config_as(SCRIPT_CONFIGS["demo"], [f"config={path}", OUT]).demo.port == 1
    with pytest.raises(ConfigError, match=r"a\.yaml: unknown key 'sweep\.typo'"):
        load_config_as(SCRIPT_CONFIGS["sweep"], [f"config={path}", OUT])
    path.write_text("swep: {guidance_scale: [2]}\n")
    with pytest.raises(ConfigError, match=r"unknown key 'swep\.guidance_scale'"):
        load_config([f"config={path}", OUT])


def test_an_older_config_with_all_sections_loads(tmp_path: Path) -> None:
    """Before, config.yaml had the sections of all scripts."""
    path = tmp_path / "config.yaml"
    scripts = {name: to_yaml(load_config_as(config, [OUT])) for name, config in SCRIPT_CONFIGS.items()}
    merged = OmegaConf.merge(*map(OmegaConf.create, scripts.values()))
    OmegaConf.save(merged, path)
    assert {*merged} == {*SCRIPT_CONFIGS, "experiment", "model", "dataset", "optimizer", "lr_scheduler", "training"} | {
        "sampling"
    }
    assert load_config([f"config={path}"]) == load_config([OUT])
    for config in SCRIPT_CONFIGS.values():
        assert load_config_as(config, [f"config={path}"]) == load_config_as(config, [OUT])


def test_the_published_place_of_a_config_is_understood(capsys: pytest.CaptureFixture) -> None:
    published = ROOT / "configs/training/generator/rear_l.yaml"
    assert load_config([f"config={published}", OUT]) == load_config([f"config={ROOT / 'configs/rear_l.yaml'}", OUT])
    assert capsys.readouterr().err == f"config={published}: no such file, {ROOT / 'configs/rear_l.yaml'} is used\n"
    with pytest.raises(ConfigError, match=r"generator/absent\.yaml: no such file"):
        load_config([f"config={published.with_name('absent.yaml')}", OUT])


def test_a_guidance_of_0_is_none(capsys: pytest.CaptureFixture) -> None:
    load_config([OUT, "model.generator.guidance_scale=0"])
    assert capsys.readouterr().err.startswith("model.generator.guidance_scale=0 is taken as 1")


def test_a_run_cannot_stop_after_its_end() -> None:
    arguments = [OUT, "training.max_train_steps=10"]
    check_training(load_config([*arguments, "training.stop_steps=10"]))
    with pytest.raises(ConfigError, match=r"stop_steps=11: expected at most training\.max_train_steps=10"):
        check_training(load_config([*arguments, "training.stop_steps=11"]))


ANNEALED = "model.generator.order=annealed"


@pytest.mark.parametrize(
    ("arguments", "start", "end"),
    [
        ([ANNEALED, "model.generator.order_anneal_end=1000"], "order_anneal_start=125000", "order_anneal_end=1000"),
        ([ANNEALED, "model.generator.order_anneal_start=200_000"], "order_anneal_start=200000", "_end=187500"),
        (["model.generator.randomness_anneal_start=187501"], "randomness_anneal_start=187501", "_end=187500"),
        (["optimizer.params.learning_rate=1e-6"], "lr_scheduler.params.end_lr=1e-05", "learning_rate=1e-06"),
    ],
)
def test_a_schedule_begins_before_it_ends(arguments: list[str], start: str, end: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_training(load_config([OUT, *arguments]))
    assert f"{start}: expected at most " in str(error.value)
    assert end in str(error.value)


def test_a_schedule_may_be_a_step_and_unused_ones_do_not_count() -> None:
    step = [f"model.generator.{name}_anneal_{end}=2000" for name in ("order", "randomness") for end in ("start", "end")]
    check_training(load_config([OUT, ANNEALED, *step]))
    check_training(load_config([OUT, "model.generator.order_anneal_end=1000"]))  # order=raster
    clean = "model.generator.perturb_mode=none"
    check_training(load_config([OUT, clean, "model.generator.randomness_anneal_start=200_000"]))
    check_training(load_config([OUT, "optimizer.params.learning_rate=1e-5"]))


def test_sharded_blocks_are_not_compiled() -> None:
    check_training(load_config([OUT, "training.fsdp=true"]))
    with pytest.raises(ConfigError, match=r"training\.compile=on: .*training\.fsdp=true"):
        check_training(load_config([OUT, "training.fsdp=true", "training.compile=on"]))


def test_the_project_s_own_configs_are_suggested_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"did you mean '{ROOT}/configs/rear_b.yaml'"):
        load_config(["config=configs/rear_b.yaml", OUT])


def module(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "utils.config", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_keys_are_printed() -> None:
    lines = module("--keys").stdout.splitlines()
    assert [line.split("=")[0] for line in lines[: len(KEYS)]] == [*KEYS]
    row = next(line for line in lines if line.startswith("model.generator.z_dim="))
    assert row.split(maxsplit=1) == [
        "model.generator.z_dim=256",
        "int >= 1                  output width of the projectors; by default model.vq_model.token_size",
    ]
    assert [line.split() for line in lines[-len(SCRIPT_SECTIONS) :]] == [[*item] for item in SCRIPT_SECTIONS.items()]


def test_the_resolved_config_is_printed_with_the_sections_of_scripts(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("sweep: {guidance_scale: [2, 4.5]}\n")
    printed = module(f"config={tmp_path / 'a.yaml'}", OUT, "demo.port=3")
    assert printed.returncode == 0, printed.stderr
    (tmp_path / "b.yaml").write_text(printed.stdout)
    for name, value in (("sweep", [2.0, 4.5]), ("demo", 3)):
        config = load_config_as(SCRIPT_CONFIGS[name], [f"config={tmp_path / 'b.yaml'}"])
        assert value in vars(getattr(config, name)).values()


def test_help_and_overrides_without_effect(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "training.seed=1", "--help"])
    with pytest.raises(SystemExit) as end:
        load_config_or_exit(Config, "What it does.", {"sampling": "all but seed"})
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("What it does.\n")
    assert "sampling.compile=auto" in printed
    assert "sampling.seed" not in printed
    assert "training." not in printed
    arguments = [OUT, "training.seed=1", "sampling.seed=1", "sampling.order=raster", "demo.port=1"]
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    load_config_or_exit(Config, "", {"experiment": "output_dir", "sampling": "all but seed"})
    assert capsys.readouterr().err == "script.py does not read training.seed, sampling.seed, demo.port\n"
    monkeypatch.setenv("RANK", "1")
    load_config_or_exit(Config, "", {"experiment": "output_dir", "sampling": "all but seed"})
    assert capsys.readouterr().err == ""


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


@pytest.mark.parametrize("script", ["train_rear", "train_tokenizer"])
def test_every_trainer_checks_its_schedules(script: str, tmp_path: Path) -> None:
    arguments = [f"experiment.output_dir={tmp_path / 'run'}", "optimizer.params.learning_rate=1e-6"]
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{script}.py", *arguments], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("config error: lr_scheduler.params.end_lr=1e-05: ")
    assert not (tmp_path / "run").exists()


def test_every_key_is_read_somewhere() -> None:
    """But for those with one choice so far, and those that others follow."""
    folders = ("modeling", "data", "evaluation", "scripts", "utils")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(path.read_text() for path in files if path.name != "schema.py")
    followed = {key.source for key in ALL_KEYS.values()}
    names = [name for name, key in ALL_KEYS.items() if len(key.choices) != 1 and name not in followed]
    assert [name for name in names if f".{name.rsplit('.', 1)[-1]}" not in code] == []
