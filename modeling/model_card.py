"""The model card of an exported model: what is known of it, and nothing else."""

import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from modeling.pretrained import CLASSES_FILE
from modeling.rear import ReAR
from modeling.tokenizers.tokenizer import Tokenizer
from utils.console import markdown_table
from utils.files.weights import weights_sha256
from utils.schema import Config

SAMPLES_FILE = "samples.png"
NAMED_CLASSES = 50  # at most, in the card
PAPER = "https://arxiv.org/abs/2510.04450"
MEANINGS = {
    "val/ar_loss": "cross-entropy on held-out codes, nats per code",
    "val/correct_tokens": "held-out codes whose logit is the largest, share",
    "val/ar_loss_noisy": "the same cross-entropy with 10 % of the context replaced",
}
LOADING = """With the sources of re-ar as the working directory (or installed), and its `requirements.txt`:

```python
from modeling.pretrained import generate_images, load_pretrained
from utils.images import save_grid

model, tokenizer = load_pretrained("{source}"{more})
images = generate_images(model, tokenizer, class_labels={labels}, seed=42)
save_grid(images, "grid.png")
```

The argument is the folder with these files, or its `OWNER/NAME` on the Hugging Face Hub. `config.json` is also a config
for the scripts of re-ar (`config=FOLDER/config.json experiment.generator_checkpoint=FOLDER`)."""


@dataclass
class CardFacts:
    config: Config  # of the training run, or the one that was given
    step: int | None  # of the weights; None: they do not tell
    record: dict[str, Any]  # what else they tell
    numbers: dict[str, tuple[float, int]]  # from the run's metrics: value and step
    class_names: list[str] | None
    is_ema: bool  # the weights are their mean along the run
    as_reference: bool  # of the tokenizer there is no copy
    shown: list[int] = field(default_factory=list)  # class labels of the picture


def model_card(facts: CardFacts, model: ReAR, tokenizer: Tokenizer, license: str | None, source: str) -> str:
    """The text of README.md.

    Args:
        license: identifier of the Hub; None: none is claimed.
        source: what loads it: the folder, or the repository.
    """
    tags = ["image-generation", "class-conditional", "autoregressive", "rear"]
    data = ModelCardData(license=license, library_name="re-ar", tags=tags)
    weights = ", tokenizer_weights=..." if facts.as_reference else ""
    labels = sorted({*facts.shown}) or [0]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {facts.config.experiment.name}",
        f"A class-conditional autoregressive generator of images, of the architecture of [reAR]({PAPER}): it predicts "
        "the codes of an image one after the other, and a frozen tokenizer makes pixels of them.",
        *_picture(facts),
        "## Loading",
        LOADING.format(source=source, labels=labels, more=weights),
        "## The model",
        markdown_table(["", ""], _model_rows(facts, model, tokenizer)),
        "## Numbers",
        _numbers(facts),
        "## Classes",
        _classes(facts, model.num_classes),
        "## Licence",
        f"{license}, as stated by who exported the model." if license else "None is stated for these weights.",
        "## Versions",
        markdown_table(["", ""], _versions()),
    ]
    text = "\n\n".join(parts) + "\n"
    assert ModelCard(text).data.to_dict() == data.to_dict()
    return text


def _picture(facts: CardFacts) -> list[str]:
    if not facts.shown:
        return []
    return [
        f"![samples]({SAMPLES_FILE})",
        f"*The first images of seed 42 for `class_labels={facts.shown}`, not chosen; by the settings below.*",
    ]


def _model_rows(facts: CardFacts, model: ReAR, tokenizer: Tokenizer) -> list[list[str]]:
    preset, trained = model.config.generator, facts.config.model.generator
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    pixels = f"{tokenizer.resolution} x {tokenizer.resolution} pixels" if tokenizer.has_images else "codes alone"
    names = ("guidance_scale", "guidance_scale_pow", "randomize_temperature", "top_k", "top_p")
    rows = {
        "parameters": f"{millions:.1f} M: {preset.num_hidden_layers} blocks of width {preset.hidden_size}",
        "images": f"{pixels}, {tokenizer.image_seq_len} codes each",
        "tokenizer": f"{tokenizer.model_type}, {tokenizer.codebook_size} codes",
        "sha256 of its weights": tokenizer.sha256(),
        "sha256 of the model's weights": weights_sha256(model),
        "sampling": ", ".join(f"{name} {getattr(preset, name)}" for name in names),
        "training": "not told by the weights",
    }
    if facts.step is not None:
        end, weight = trained.randomness_anneal_end, trained.transition_alignment_weight
        noise = f"{trained.perturb_mode}, of up to {trained.perturb_ratio_max} of the codes, 0 from step {end} on"
        rows |= {
            "training": f"{facts.step} of {facts.config.training.max_train_steps} steps",
            "weights": "their mean along the run (EMA)" if facts.is_ema else "those of that step",
            "order of the codes": trained.order,
            "noise of the context": noise if trained.perturb_mode != "none" else "none",
            "embedding regularization": f"weight {weight}" if trained.transition_alignment else "none",
        }
    hashes = {f"sha256 of the {name}": facts.record.get(name) for name in ("data", "code")}
    return [[name, str(value)] for name, value in {**rows, **hashes}.items() if value]


def _numbers(facts: CardFacts) -> str:
    if not facts.numbers:
        return "The run has no held-out numbers and no scores."
    rows = [[name, MEANINGS.get(name, ""), f"{value:.5g}", str(at)] for name, (value, at) in facts.numbers.items()]
    return markdown_table(["metric", "meaning", "value", "step"], rows)


def _classes(facts: CardFacts, count: int) -> str:
    if facts.class_names is None:
        return f"{count}, from 0 to {count - 1}; their names are not known here."
    if count > NAMED_CLASSES:
        return f"{count}, from 0 to {count - 1}; their names are in `{CLASSES_FILE}`."
    names = [name.replace("|", r"\|") for name in facts.class_names]
    return markdown_table(["label", "name"], [[str(label), name] for label, name in enumerate(names)])


def _versions() -> list[list[str]]:
    """Of the export; the hash of the code that trained the weights stands above."""
    packages = ("torch", "numpy", "safetensors", "huggingface_hub")
    return [["python", platform.python_version()], *([name, version(name)] for name in packages)]
