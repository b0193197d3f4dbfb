"""Write the parts of docs/ that follow from the code: the table of all config keys and the figures of the schedules.

    python docs/generate.py

Writes docs/config.md from utils/schema.py and the sections of the scripts, and docs/figures/noise_schedule.svg and
docs/figures/guidance_schedule.svg from the functions that training and sampling call. Run it after a change of a key.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import yaml
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from modeling.perturbation import perturbation_ratio
from modeling.sampling.generate import guidance_schedule
from scripts.complete_images import CompletionConfig
from scripts.demo import DemoConfig
from scripts.inspect_codes import InspectionConfig
from scripts.sweep_guidance import SweepConfig
from scripts.train_tokenizer import VQTrainingConfig
from utils.config import SCRIPT_SECTIONS, load_config
from utils.console import markdown_text
from utils.files.atomic import atomic_file, write_text
from utils.keys import MISSING, REQUIRED, Key, keys_of
from utils.schedules import cosine
from utils.schema import Config, GeneratorConfig, ParamGroupConfig, TapConfig, VQModelConfig

PAGE = ROOT / "docs/config.md"
FIGURES = ROOT / "docs/figures"
SECTIONS_OF_SCRIPTS = {
    "vq_training": VQTrainingConfig,
    "inspection": InspectionConfig,
    "completion": CompletionConfig,
    "sweep": SweepConfig,
    "demo": DemoConfig,
}
LISTS = {"model.generator.taps": TapConfig, "optimizer.param_groups": ParamGroupConfig}  # keys with entries of keys
HEAD = """# Config keys

```bash
python -m utils.config --keys
python -m utils.config config=configs/rear_b.yaml training.seed=1
```

The first command prints these keys in the terminal, the second the resolved config of a run. `--help` of a script
prints the keys that it reads. The YAML file of `config=` overrides the defaults below, and `key=value` arguments
override both.

`docs/generate.py` writes this page from `utils/schema.py` and the scripts; edit the keys there.
"""


def config_page() -> str:
    """The text of docs/config.md."""
    by_section: dict[str, list[Key]] = {}
    for key in keys_of(Config).values():
        by_section.setdefault(key.name.rpartition(".")[0], []).append(key)
    parts = [HEAD]
    for name, keys in by_section.items():
        section = VQModelConfig if name == "model.vq_model" else keys[0].section
        parts.append(f"## {name}\n\n{section.__doc__}\n\n{key_table(keys)}\n")
        for key in keys:
            if key.name in LISTS:
                entry = LISTS[key.name]
                parts.append(f"### Entries of {key.name}\n\n{linked(str(entry.__doc__))}\n\n{table_of(entry)}\n")
    for name, section in SECTIONS_OF_SCRIPTS.items():
        parts.append(
            f"## {name}\n\n{section.__doc__} Only `{SCRIPT_SECTIONS[name]}` reads it.\n\n{table_of(section)}\n"
        )
    return "\n".join(parts)


def table_of(section: type) -> str:
    return key_table([*keys_of(section).values()])


def key_table(keys: list[Key]) -> str:
    lines = ["| key | type and range | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        name = key.name.rpartition(".")[2]
        lines.append(f"| `{name}` | {allowed(key)} | {default(key)} | {linked(markdown_text(meaning(key)))} |")
    return "\n".join(lines)


def allowed(key: Key) -> str:
    """What can be given: choices, or types with their range."""
    if key.name in LISTS:
        return "list of the entries below"
    return " or ".join(f"`{choice}`" for choice in key.choices) or key.allowed.replace(" | ", " or ")


def default(key: Key) -> str:
    if key.default in (MISSING, REQUIRED):
        return "required"
    if key.source:
        return f"`{key.source}`" if key.source in keys_of(Config) else key.source
    text = yaml.safe_dump(key.default, default_flow_style=True).splitlines()[0]
    return f"`{text}`"


def meaning(key: Key) -> str:
    return f"{key.help}; another value is an error" if key.equals else key.help


def linked(text: str) -> str:
    """With links in place of the names of other pages."""
    return re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", text)


def draw_noise_schedule(path: Path) -> None:
    """The perturbation ratio and the learning rate of configs/rear_b.yaml at each step."""
    config = load_config([f"config={ROOT}/configs/rear_b.yaml", "experiment.output_dir=unused"])
    generator, params, last = config.model.generator, config.lr_scheduler.params, config.training.max_train_steps
    steps = range(0, last + 1, last // 100)
    largest = [perturbation_ratio(step, generator) for step in steps]
    rates = [
        cosine(step, peak=params.learning_rate, warmup_steps=params.warmup_steps, max_steps=last, end_lr=params.end_lr)
        for step in steps
    ]
    figure, (ratio, rate) = two_panels()
    ratio.fill_between(steps, largest, color="C0", alpha=0.15, label="ratio of an image: drawn from U(0, f)")
    ratio.plot(steps, largest, color="C0", label="f, largest ratio")
    ratio.plot(steps, [value / 2 for value in largest], color="C0", linestyle="--", label="f / 2, mean ratio")
    ratio.set_title(f"perturbation ratio: 0 from step {generator.randomness_anneal_end:,} on")
    ratio.set_ylim(0, 1.02)
    ratio.legend(frameon=False)
    rate.plot(steps, rates, color="C1")
    rate.set_title(f"learning rate: warm-up until step {params.warmup_steps:,}")
    rate.set_ylim(0, 1.05 * params.learning_rate)
    for axes in (ratio, rate):
        axes.set_xlabel("step")
        axes.set_xlim(0, last)
        axes.set_xticks([0, params.warmup_steps, last // 2, generator.randomness_anneal_end, last])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 62.5k
    save(figure, path)


def draw_guidance_schedule(path: Path) -> None:
    """The guidance scale of each token: of the published configs, and for several exponents."""
    figure, (published, exponents) = two_panels()
    for name in ("rear_b", "rear_l", "rar_xl"):
        config = load_config([f"config={ROOT}/configs/{name}.yaml", "experiment.output_dir=unused"]).model.generator
        draw_guidance(published, config, f"{name}: g = {config.guidance_scale:g}, pow = {config.guidance_scale_pow:g}")
    published.set_title("published settings")
    published.legend(frameon=False)
    for exponent in (0.0, 0.5, 1.0, 2.25, 4.0):
        generator = GeneratorConfig(guidance_scale=4.0, guidance_scale_pow=exponent)
        draw_guidance(exponents, generator, f"pow = {exponent:g}")
    exponents.set_title("effect of the exponent, g = 4")
    exponents.legend(frameon=False, loc="lower left", ncols=3, fontsize="small")
    for axes in (published, exponents):
        axes.set_xlabel("token k of 256, in raster order")
        axes.set_xlim(0, 256)
        axes.set_ylim(0)
    published.set_ylabel("guidance scale")
    save(figure, path)


def draw_guidance(axes: Axes, generator: GeneratorConfig, label: str) -> None:
    scales = guidance_schedule(
        guidance_scale=generator.guidance_scale,
        guidance_scale_pow=generator.guidance_scale_pow,
        steps=generator.image_seq_len,
    )
    axes.plot(range(len(scales)), scales, label=label)


def two_panels() -> tuple[Figure, list[Axes]]:
    with rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes in panels:
            axes.grid(alpha=0.3)
        return figure, [*panels]


def save(figure: Figure, path: Path) -> None:
    """Write an SVG atomically, without date and random names: the same figure gives the same file."""
    with rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}), atomic_file(path) as partial:
        FigureCanvasSVG(figure).print_svg(partial, metadata={"Date": None})


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write_text(PAGE, config_page())
    draw_noise_schedule(FIGURES / "noise_schedule.svg")
    draw_guidance_schedule(FIGURES / "guidance_schedule.svg")
    print(f"wrote {PAGE} and two figures to {FIGURES}")


if __name__ == "__main__":
    main()
