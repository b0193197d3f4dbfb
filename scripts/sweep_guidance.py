"""Find the best guidance and temperature: sample with each setting and score the samples.

    torchrun --nproc_per_node=8 scripts/sweep_guidance.py config=configs/rear_b.yaml \\
        experiment.output_dir=outputs/rear_b_sweep experiment.generator_checkpoint=outputs/rear_b \\
        sweep.reference=VIRTUAL_imagenet256_labeled.npz sampling.num_fid_samples=10000 "sweep.guidance_scale=[4,8,16]"

The settings are all combinations of the lists in the section `sweep`. Each samples the same images (classes and random
numbers), which are scored with Inception if its weights are in torch hub's cache, else with EfficientNet-Lite0, and not
kept. The reference is split at random into halves: the setting with the smallest Frechet distance to one half is the
best; report its distance to the other half, since selecting by a score biases it.

Writes to `experiment.output_dir`: sweep.json (all numbers and their provenance; a different provenance is an error),
sweep.md (the table), sweep.png (distance and, with Inception, Inception Score against guidance) and best.txt (the best
setting as arguments for the sampler). Rerun the same command to resume a killed sweep at the next setting; more values
in the lists extend the table.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from utils.config import load_config_or_exit
from utils.keys import NonEmpty, NonNegativeFloat, key, section
from utils.schema import Config, GuidanceScale, Temperature

READS = {
    "experiment": "output_dir tokenizer_checkpoint generator_checkpoint allow_other_tokenizer",
    "model": "all",
    "dataset.params": "train_shards_path_or_url pretokenization cache_dir cache_size_gb",  # for class names
    "training": "enable_tf32",
    "sampling": "all but save_png",
    "sweep": "all",
}


@dataclass
class SweepConfig:
    """Lists of settings to compare."""

    reference: str | None = key(None, "npz of images: one half selects the best setting, the other half scores it")
    guidance_scale: NonEmpty[list[GuidanceScale]] = key(
        [1.0, 2.0, 4.0, 8.0], "values of model.generator.guidance_scale, combined with all values below"
    )
    guidance_scale_pow: NonEmpty[list[NonNegativeFloat]] | None = key(
        None, "values of model.generator.guidance_scale_pow; null: only the model's"
    )
    randomize_temperature: NonEmpty[list[Temperature]] | None = key(
        None, "values of model.generator.randomize_temperature; null: only the model's"
    )


@dataclass
class SweepGuidanceConfig(Config):
    sweep: SweepConfig = section(SweepConfig)


if __name__ == "__main__":  # a wrong config ends here, before the slow imports
    CONFIG = load_config_or_exit(SweepGuidanceConfig, __doc__, READS)

from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from data.training_batches import classes_to_sample
from evaluation.features import Extractor
from evaluation.inputs import Npz, open_input
from evaluation.report import TITLES
from evaluation.sample_distance import HALVES, SplitReference, find_extractor
from modeling.loading import load_generator, load_tokenizer
from modeling.sampling.image_sampler import ImageSampler, asked_images
from modeling.tokenizers.tokenizer import Tokenizer
from utils.console import markdown_table
from utils.distributed import DistributedContext, init_distributed
from utils.errors import InputError, NonFiniteError, input_errors_exit
from utils.files.atomic import write_text
from utils.files.json_file import read_json
from utils.files.provenance import is_made, write_record
from utils.precision import matmul_precision
from utils.run.curves import draw_curve, panel_grid, save_figure
from utils.run.image_provenance import image_provenance
from utils.run.weights_path import TrainedWeights, find_generator_weights


class Setting(NamedTuple):
    """Values of `model.generator`; the lists in the section `sweep` have the same names."""

    guidance_scale: float
    guidance_scale_pow: float
    randomize_temperature: float

    def __str__(self) -> str:
        return " ".join(f"model.generator.{key}={value}" for key, value in self._asdict().items())


Scores = dict[str, float]
KEYS = Setting._fields
WITHOUT_EFFECT = ("sampling.per_gpu_batch_size", "sampling.save_png")
DISTANCES = {"fid": TITLES["fid"], "frechet_lite0": TITLES["frechet_distance"]}


def main(config: SweepGuidanceConfig) -> None:
    tokenizer = load_tokenizer(config)
    if not tokenizer.has_images:
        raise tokenizer.no_images("sweep.reference")
    with init_distributed() as ctx, ctx.locked(Path(config.experiment.output_dir), inside=True):
        sweep(config, tokenizer, ctx)


def sweep(config: SweepGuidanceConfig, tokenizer: Tokenizer, ctx: DistributedContext) -> None:
    """Write the files of `experiment.output_dir`."""
    output_dir, batch_size = Path(config.experiment.output_dir), config.sampling.per_gpu_batch_size
    reference = ctx.rank0_first(open_reference, config, tokenizer.resolution, verify=ctx.is_rank0)
    weights, config = find_generator_weights(config, tokenizer.sha256(), ctx)
    classes, indices = ctx.broadcast_from_rank0(asked, config, weights)
    model = load_generator(weights.path, config.model)
    distance, extractor = ctx.rank0_first(find_extractor, ctx.device, "sweep.reference")
    sampler_provenance = image_provenance(
        config, class_labels=classes, indices=indices, model=model, tokenizer=tokenizer, device=ctx.device
    )
    provenance = provenance_of(sampler_provenance, reference, extractor)
    scores = ctx.broadcast_from_rank0(read_scores, output_dir / "sweep.json", provenance)
    missing = [setting for setting in settings_of(config) if setting not in scores]
    model.to(ctx.device).eval()
    tokenizer.to(ctx.device)
    halves = SplitReference(reference.images, extractor, batch_size, ctx) if missing else None
    for setting in missing:
        assert halves is not None
        sampler = ImageSampler(
            model, tokenizer, with_setting(config, setting), min(batch_size, len(indices)), ctx.print_on_rank0
        )
        images = SampledImages(sampler, indices, config.training.enable_tf32)
        try:
            scores[setting] = halves.scores(images, title=str(setting))
        except NonFiniteError as error:
            source = f"experiment.generator_checkpoint={config.experiment.generator_checkpoint}"
            raise InputError(f"{setting}: {error} ({source})") from error
        del sampler, images  # free their memory before the next ones
        ctx.broadcast_from_rank0(write_scores, output_dir / "sweep.json", scores, distance, provenance)
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in scores[setting].items())
        ctx.print_on_rank0(f"{setting}: {numbers}")
    if ctx.is_rank0:
        report(output_dir, scores, DISTANCES[distance], f"{len(indices)} samples each")


def open_reference(config: SweepGuidanceConfig, resolution: int, verify: bool) -> Npz:
    """Raises InputError if the key is missing, or does not name an npz of images of this size."""
    if config.sweep.reference is None:
        raise InputError("sweep.reference: missing; give an npz of images to compare with")
    npz = open_input(Path(config.sweep.reference), verify)
    if npz.images.shape[1:3] != (resolution, resolution):
        found = "x".join(map(str, npz.images.shape[1:3]))
        raise InputError(f"{npz.images.path}: found images of {found} pixels, expected {resolution}x{resolution}")
    return npz


def asked(config: SweepGuidanceConfig, weights: TrainedWeights) -> tuple[list[int], list[int]]:
    """Class ids and indices of the images that each setting samples; raises InputError for classes that the model does
    not have, or one image."""
    classes = classes_to_sample(config, weights)
    indices = asked_images(config.sampling, classes, config.model.generator.condition_num_classes)
    if len(indices) < 2:
        raise InputError("sampling.num_fid_samples: found 1 image to sample, expected at least 2")
    return classes, indices


def settings_of(config: SweepGuidanceConfig) -> list[Setting]:
    """All combinations of the lists, each once."""
    generator, lists = config.model.generator, config.sweep
    powers = lists.guidance_scale_pow or [generator.guidance_scale_pow]
    temperatures = lists.randomize_temperature or [generator.randomize_temperature]
    combinations = dict.fromkeys(product(lists.guidance_scale, powers, temperatures))
    return [Setting(*values) for values in combinations]


def with_setting(config: SweepGuidanceConfig, setting: Setting) -> Config:
    generator = replace(config.model.generator, **setting._asdict())
    return replace(config, model=replace(config.model, generator=generator))


def provenance_of(sampler_provenance: dict[str, Any], reference: Npz, extractor: Extractor) -> dict[str, Any]:
    """Everything that the scores depend on, except the setting."""
    left_out = (*WITHOUT_EFFECT, *(f"model.generator.{key}" for key in KEYS))
    return {
        **{key: value for key, value in sampler_provenance.items() if key not in left_out},
        "sha256 of sweep.reference": reference.sha256,
        "sha256 of the feature weights": extractor.weights_sha256,
    }


def read_scores(path: Path, provenance: dict[str, Any]) -> dict[Setting, Scores]:
    """The scores of finished settings; raises InputError if they have a different provenance."""
    rows = read_json(path)["settings"] if is_made(path, provenance) else []
    return {Setting(**{key: row.pop(key) for key in KEYS}): row for row in rows}


def write_scores(path: Path, scores: dict[Setting, Scores], distance: str, provenance: dict[str, Any]) -> None:
    rows = [{**setting._asdict(), **scores[setting]} for setting in in_order(scores)]
    write_record(path, provenance, figures={"distance": distance, "best": str(best_of(scores)), "settings": rows})


def family_of(setting: Setting) -> tuple[float, float]:
    return setting.guidance_scale_pow, setting.randomize_temperature


def in_order(scores: dict[Setting, Scores]) -> list[Setting]:
    """Settings sorted by power and temperature, then by guidance scale."""
    return sorted(scores, key=lambda setting: (family_of(setting), setting.guidance_scale))


def best_of(scores: dict[Setting, Scores]) -> Setting:
    return min(in_order(scores), key=lambda setting: scores[setting][HALVES[0]])


class SampledImages:
    """The images of a setting, with the interface of images in a file; sampled when they are read."""

    def __init__(self, sampler: ImageSampler, indices: list[int], tf32: bool) -> None:
        self.sampler = sampler
        self.indices = indices
        self.tf32 = tf32

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> np.ndarray:
        with matmul_precision(self.tf32):  # features are computed without
            return self.sampler(self.indices[start:stop])


def report(output_dir: Path, scores: dict[Setting, Scores], distance: str, num_samples: str) -> None:
    """Write sweep.md, best.txt and sweep.png."""
    best = best_of(scores)
    columns = {half: f"{distance}, {half.replace('_', ' ')}" for half in HALVES}
    if has_inception_score(scores):
        columns["inception_score"] = "Inception Score"
    lines = [
        [*map(str, setting._asdict().values()), *(f"{scores[setting][column]:.4g}" for column in columns)]
        for setting in in_order(scores)
    ]
    choice = f"best by the {HALVES[0].replace('_', ' ')}: {best}"
    result = f"its {distance} to the other half of the reference, {num_samples}: {scores[best][HALVES[1]]:.4g}"
    text = f"{markdown_table([*KEYS, *columns.values()], lines)}\n\n{choice}\n\n{result}\n"
    write_text(output_dir / "sweep.md", text)
    write_text(output_dir / "best.txt", f"{best}\n")
    draw(scores, distance, output_dir / "sweep.png")
    print(text, f"look at {output_dir / 'sweep.png'}", sep="\n")


def has_inception_score(scores: dict[Setting, Scores]) -> bool:
    return all("inception_score" in values for values in scores.values())


def draw(scores: dict[Setting, Scores], distance: str, path: Path) -> None:
    """Scores against the guidance scale, a colour for each power and temperature; a ring around the best setting."""
    panels = [(f"{distance}, other half dashed", {HALVES[0]: "-", HALVES[1]: "--"})]  # title, line style of each score
    if has_inception_score(scores):
        panels.append(("Inception Score", {"inception_score": "-"}))
    figure, grid = panel_grid(len(panels), x_label="guidance_scale")
    best = best_of(scores)
    families = list(dict.fromkeys(map(family_of, in_order(scores))))
    for axes, (title, line_styles) in zip(grid, panels, strict=False):
        axes.set_title(title, fontsize="small")
        for name, line_style in line_styles.items():
            for number, family in enumerate(families):
                settings = [setting for setting in in_order(scores) if family_of(setting) == family]
                points = [setting.guidance_scale for setting in settings], [scores[s][name] for s in settings]
                label = f"power {family[0]:g}, temperature {family[1]:g}" if line_style == "-" else None
                draw_curve(axes, name, points, color=f"C{number}", linestyle=line_style, label=label)
        y = scores[best][next(iter(line_styles))]
        axes.plot(best.guidance_scale, y, "o", markersize=10, markerfacecolor="none", color="black")
    grid[0].legend(fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
