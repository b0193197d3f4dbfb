"""Find guidance and temperature: sample with each of several settings, score the samples, keep the best setting.

    torchrun --nproc_per_node=8 scripts/sweep_guidance.py config=configs/rear_b.yaml \\
        experiment.output_dir=outputs/rear_b_sweep experiment.generator_checkpoint=outputs/rear_b \\
        sweep.reference=VIRTUAL_imagenet256_labeled.npz sampling.num_fid_samples=10000 "sweep.guidance_scale=[4,8,16]"

The settings are all combinations of the lists in the section sweep. Each samples the same images (classes and random
numbers), which are scored as they come and not kept, by Inception if its weights are in torch hub's cache, else by
EfficientNet-Lite0. The images of the reference are split in two at random: the setting with the least Frechet distance
to one half is the best, and its distance to the other half is the number to report.

Writes to `experiment.output_dir`: sweep.json (all numbers, and what they were made from: others are not mixed with
them), sweep.md (the table), sweep.png (distance and, with Inception, Inception Score against guidance) and best.txt
(the best setting as arguments for the sampler). The same command continues a killed sweep with the next setting; more
values in the lists add to the table.
"""

import sys
from pathlib import Path

READS = (
    *("experiment.output_dir", "experiment.tokenizer_checkpoint", "experiment.generator_checkpoint"),
    *("experiment.allow_other_tokenizer", "model", "training.enable_tf32", "sampling", "-sampling.save_png", "sweep"),
    *("dataset.params.train_shards_path_or_url", "dataset.params.pretokenization"),  # for names of classes
)

if __name__ == "__main__":  # a typo in the config ends here, before the slow imports
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory
    from utils.config import load_config_or_exit

    CONFIG = load_config_or_exit(__doc__, READS)

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from data.training_batches import asked_classes
from evaluation.features import Extractor
from evaluation.inputs import Npz, open_input
from evaluation.report import TITLES
from evaluation.sample_distance import HALVES, SplitReference, find_extractor
from modeling.sampling.image_inputs import asked_images
from modeling.sampling.image_sampler import ImageSampler, images_made_from, load_trained
from modeling.tokenizers.registry import load_tokenizer
from utils.config import Config
from utils.console import markdown_table
from utils.distributed import DistributedContext, init_distributed
from utils.errors import InputError, NonFiniteError, input_errors_exit
from utils.files.atomic import write_text
from utils.files.json_file import read_json
from utils.files.lock import only_writer
from utils.files.provenance import is_made, write_record
from utils.precision import matmul_precision
from utils.run.curves import draw_curve, panel_grid, save_figure

KEYS = ("guidance_scale", "guidance_scale_pow", "randomize_temperature")  # of model.generator, and of the lists
NO_MATTER = ("sampling.per_gpu_batch_size", "sampling.save_png", *(f"model.generator.{key}" for key in KEYS))
DISTANCES = {"fid": TITLES["fid"], "frechet_lite0": TITLES["frechet_distance"]}

Setting = tuple[float, ...]  # a value for each of KEYS
Scores = dict[str, float]


def main(config: Config) -> None:
    with ExitStack() as held, init_distributed() as ctx:
        sweep(config, held, ctx)


def sweep(config: Config, held: ExitStack, ctx: DistributedContext) -> None:
    """The files of `experiment.output_dir`, whose lock `held` gets."""
    output_dir, size = Path(config.experiment.output_dir), config.sampling.per_gpu_batch_size
    tokenizer = load_tokenizer(config)
    if not tokenizer.has_images:
        raise tokenizer.no_images("sweep.reference")
    ctx.broadcast_from_rank0(lambda: held.enter_context(only_writer(output_dir, inside=True)))
    reference = ctx.rank0_first(lambda: open_reference(config, tokenizer.resolution, ctx.is_rank0))
    classes, indices = ctx.broadcast_from_rank0(lambda: asked(config))
    model, _ = load_trained(config, tokenizer, ctx)
    distance, extractor = ctx.rank0_first(lambda: find_extractor(ctx.device, "sweep.reference"))
    made_from = images_made_from(config, classes, indices, model, tokenizer, ctx.device)
    made_from = origin(made_from, reference, extractor)
    done = ctx.broadcast_from_rank0(lambda: read_scores(output_dir / "sweep.json", made_from))
    missing = [setting for setting in settings_of(config) if setting not in done]
    model.to(ctx.device).eval()
    tokenizer.to(ctx.device)
    halves = SplitReference(reference.images, extractor, size, ctx) if missing else None
    notice: Callable[[str], object] = print if ctx.is_rank0 else lambda line: None
    for setting in missing:
        assert halves is not None
        name, with_setting = as_overrides(setting), with_values(config, setting)
        sampler = ImageSampler(model, tokenizer, with_setting, min(size, len(indices)), notice)
        try:
            done[setting] = halves.scores(SampledImages(sampler, indices, config.training.enable_tf32), name)
        except NonFiniteError as error:
            weights = f"experiment.generator_checkpoint={config.experiment.generator_checkpoint}"
            raise InputError(f"{name}: {error} ({weights})") from error
        del sampler  # frees its memory before the next one
        ctx.broadcast_from_rank0(lambda: write_scores(output_dir / "sweep.json", done, distance, made_from))
        if ctx.is_rank0:
            print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in done[setting].items()), flush=True)
    if ctx.is_rank0:
        report(output_dir, done, DISTANCES[distance], f"{len(indices)} samples each")


def open_reference(config: Config, resolution: int, verify: bool) -> Npz:
    """
    Raises:
        InputError: the key is missing, or it names no npz of images of this size.
    """
    if config.sweep.reference is None:
        raise InputError("sweep.reference: missing; give an npz of images to compare with")
    npz = open_input(Path(config.sweep.reference), verify)
    if npz.images.shape[1:3] != (resolution, resolution):
        found = "x".join(map(str, npz.images.shape[1:3]))
        raise InputError(f"{npz.images.path}: found images of {found} pixels, expected {resolution}x{resolution}")
    return npz


def asked(config: Config) -> tuple[list[int], list[int]]:
    """Class ids and indices of the images that each setting samples.

    Raises:
        InputError: classes that are not there, or a single image.
    """
    classes = asked_classes(config)
    indices = asked_images(config.sampling, classes, config.model.generator.condition_num_classes)
    if len(indices) < 2:
        raise InputError("sampling.num_fid_samples: found 1 image to sample, expected at least 2")
    return classes, indices


def settings_of(config: Config) -> list[Setting]:
    """All combinations of the lists, each once."""
    generator, lists = config.model.generator, config.sweep
    powers = lists.guidance_scale_pow or [generator.guidance_scale_pow]
    temperatures = lists.randomize_temperature or [generator.randomize_temperature]
    return list(dict.fromkeys(product(lists.guidance_scale, powers, temperatures)))


def with_values(config: Config, setting: Setting) -> Config:
    scale, power, temperature = setting
    generator = replace(
        config.model.generator,
        guidance_scale=scale,
        guidance_scale_pow=power,
        randomize_temperature=temperature,
    )
    return replace(config, model=replace(config.model, generator=generator))


def origin(made_from: dict[str, Any], reference: Npz, extractor: Extractor) -> dict[str, Any]:
    """All that the scores of a setting depend on, beside the setting."""
    return {
        **{key: value for key, value in made_from.items() if key not in NO_MATTER},
        "sha256 of sweep.reference": reference.sha256,
        "sha256 of the feature weights": extractor.weights_sha256,
    }


def read_scores(path: Path, made_from: dict[str, Any]) -> dict[Setting, Scores]:
    """Of the settings that are done.

    Raises:
        InputError: they were made from something else.
    """
    rows = read_json(path)["settings"] if is_made(path, made_from) else []
    return {tuple(row.pop(key) for key in KEYS): row for row in rows}


def write_scores(path: Path, done: dict[Setting, Scores], distance: str, made_from: dict[str, Any]) -> None:
    rows = [{**dict(zip(KEYS, setting, strict=True)), **done[setting]} for setting in in_order(done)]
    write_record(path, made_from, figures={"distance": distance, "best": as_overrides(best_of(done)), "settings": rows})


def in_order(done: dict[Setting, Scores]) -> list[Setting]:
    """By power and temperature, then by guidance scale, whatever was sampled first."""
    return sorted(done, key=lambda setting: (setting[1:], setting[0]))


def best_of(done: dict[Setting, Scores]) -> Setting:
    return min(in_order(done), key=lambda setting: done[setting][HALVES[0]])


def as_overrides(setting: Setting) -> str:
    return " ".join(f"model.generator.{key}={value}" for key, value in zip(KEYS, setting, strict=True))


class SampledImages:
    """The images of a setting as those of a file: made when they are read, as the sampler would make them."""

    def __init__(self, sampler: ImageSampler, indices: list[int], tf32: bool) -> None:
        self.sampler, self.indices, self.tf32 = sampler, indices, tf32

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> np.ndarray:
        with matmul_precision(self.tf32):  # features are computed without
            return self.sampler(self.indices[start:stop])


def report(output_dir: Path, done: dict[Setting, Scores], distance: str, how_many: str) -> None:
    """sweep.md, best.txt and sweep.png of finished settings."""
    best, has_score = best_of(done), all("inception_score" in scores for scores in done.values())
    columns = [*HALVES, "inception_score"] if has_score else list(HALVES)
    titles = [f"{distance}, {name.replace('_', ' ')}" for name in HALVES] + ["Inception Score"] * has_score
    lines = [
        [*map(str, setting), *(f"{done[setting][column]:.4g}" for column in columns)] for setting in in_order(done)
    ]
    choice = f"best by the {HALVES[0].replace('_', ' ')}: {as_overrides(best)}"
    result = f"its {distance} to the other half of the reference, {how_many}: {done[best][HALVES[1]]:.4g}"
    text = f"{markdown_table([*KEYS, *titles], lines)}\n\n{choice}\n\n{result}\n"
    write_text(output_dir / "sweep.md", text)
    write_text(output_dir / "best.txt", as_overrides(best) + "\n")
    draw(done, distance, [list(HALVES), ["inception_score"]][: 1 + has_score], output_dir / "sweep.png")
    print(text, f"look at {output_dir / 'sweep.png'}", sep="\n")


def draw(done: dict[Setting, Scores], distance: str, panels: list[list[str]], path: Path) -> None:
    """Scores against the guidance scale, a colour for each power and temperature; a ring around the best setting."""
    figure, grid = panel_grid(len(panels), x_label="guidance_scale")
    best, families = best_of(done), list(dict.fromkeys(setting[1:] for setting in in_order(done)))
    for axes, names, title in zip(grid, panels, [f"{distance}, other half dashed", "Inception Score"], strict=False):
        axes.set_title(title, fontsize="small")
        for name, line in zip(names, ("-", "--"), strict=False):
            for number, family in enumerate(families):
                settings = [setting for setting in in_order(done) if setting[1:] == family]
                points = [setting[0] for setting in settings], [done[setting][name] for setting in settings]
                label = f"power {family[0]:g}, temperature {family[1]:g}" if line == "-" else None
                draw_curve(axes, name, points, color=f"C{number}", linestyle=line, label=label)
        axes.plot(best[0], done[best][names[0]], "o", markersize=10, markerfacecolor="none", color="black")
    grid[0].legend(fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
