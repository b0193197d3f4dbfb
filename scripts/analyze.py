"""Analyze trained models: what they predict, what their layers represent, how they react to wrong context.

    python scripts/analyze.py outputs/rear_b outputs/rear_b_ar --output outputs/analysis
    python scripts/analyze.py rear.safetensors config=configs/rear_b.yaml --tokens val.tokens --output outputs/analysis

CHECKPOINT is a run folder, a checkpoint or weights; KEY=VALUE overrides its config. The tokens are --tokens, else the
validation data of the first config, else its training tokens. For each model:

- token accuracy and loss by position, on clean context and with 10 % of it replaced at random;
- codebook vectors recovered from each block's output by a linear map, fitted to one half of the images: cosine by
  position on the other half, of the current token (own) and of the predicted one (next);
- linear CKA of each block's output with these vectors and, with --encoder, with features of the decoded images;
- loss when a fraction of the context is replaced by random tokens, or by the tokens with the nearest vectors;
- entropy and codebook use of the model's samples (temperature 1, no guidance) against the tokens.

Writes analysis.json (all numbers) and analysis.png (a page of figures) to --output, and prints a table.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.codes.code_statistics import CodeStatistics
from data.images.reading import evenly_spaced
from data.loading import Batches, on_device
from data.training_batches import TrainingSet, open_training_data
from data.validation_data import open_validation_data
from evaluation.analysis_figure import draw
from evaluation.representation import Covariances
from evaluation.validator import perturbed
from modeling.analysis import POSITIONS, Predictions, by_position, hidden_states, nearest_codes, predictions
from modeling.encoders.encoder import FrozenEncoder
from modeling.encoders.registry import open_encoder
from modeling.loading import load_generator, load_tokenizer
from modeling.perturbation import num_perturbation_uniforms
from modeling.rear import ReAR
from modeling.robust_embedding import perturbation_mask, switch_codes
from modeling.sampling.model_samples import ModelSamples
from modeling.tokenizers.tokenizer import Tokenizer
from utils.arguments import natural, positive
from utils.console import markdown_table
from utils.errors import InputError, input_errors_exit
from utils.files.hashing import hash_of
from utils.files.lock import only_writer
from utils.files.provenance import is_made, write_record
from utils.files.text import user_path
from utils.files.weights import weights_sha256
from utils.randomness import Stream, validation_uniforms
from utils.run.run_config import load_run_config, names_of_runs
from utils.run.weights_path import find_generator_weights
from utils.schema import Config

RESULT_FILE, FIGURE_FILE = "analysis.json", "analysis.png"
SEQUENCES_AT_ONCE = 32
SWAP_RATES = (0.1, 0.25, 0.5)


@dataclass
class Tokens:
    """The analyzed tokens, and what depends only on them and the tokenizer; on one device."""

    codes: Tensor  # (n, N) int64
    class_labels: Tensor  # (n,) int64
    corrupted: Tensor  # (n, N), with 10 % of the codes replaced
    codebook: Tensor  # (V, Z)
    source: str
    fingerprint: str
    encoder_features: Tensor | None = None  # (n, N, Z') of the decoded images

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def batches(self) -> list[slice]:
        return [slice(start, start + SEQUENCES_AT_ONCE) for start in range(0, len(self), SEQUENCES_AT_ONCE)]

    @property
    def halves(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Batches of row numbers: every second image, and the others."""
        rows = torch.arange(len(self), device=self.codes.device)
        return rows[::2].split(SEQUENCES_AT_ONCE), rows[1::2].split(SEQUENCES_AT_ONCE)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    with only_writer(options.output, inside=True):
        analyze(options)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", metavar="CHECKPOINT | KEY=VALUE", nargs="+", type=os.path.expanduser)
    parser.add_argument("--output", metavar="FOLDER", type=user_path, required=True, help="folder of the results")
    parser.add_argument("--tokens", metavar="STORE", help="a .tokens store or .jsonl of tokens")
    parser.add_argument("--n", type=positive, default=1000, help="images, at equal steps of the data (%(default)s)")
    parser.add_argument("--encoder", metavar="NAME", help="efficientnet_lite0 or timm:NAME[:FILE]")
    parser.add_argument("--seed", type=natural, default=1, help="of the samples (default: %(default)s)")
    return parser.parse_intermixed_args(argv)


def analyze(options: argparse.Namespace) -> None:
    overrides = [word for word in options.words if "=" in word]
    sources = [word for word in options.words if "=" not in word]
    if not sources:
        raise InputError("command line: found no CHECKPOINT, expected a run folder, checkpoint or weights file")
    if options.n < 2:
        raise InputError(f"--n {options.n}: expected at least 2; the linear maps are fitted to one half")
    names = names_of_runs(sources)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_run_config(sources[0], overrides)
    tokenizer = load_tokenizer(config).to(device)
    models = {name: load_model(source, overrides, tokenizer) for name, source in zip(names, sources, strict=True)}
    encoder = None if options.encoder is None else encoder_of(options.encoder, tokenizer).to(device)
    tokens = read_tokens(config, options.tokens, options.n, tokenizer, device)
    provenance = {
        **{f"sha256 of {name}": weights_sha256(model) for name, model in models.items()},
        "tokens": tokens.fingerprint,
        "n": len(tokens),
        "seed": options.seed,
        "encoder": None if encoder is None else str(encoder),
        "device": device.type,
    }
    if is_made(options.output / RESULT_FILE, provenance) and (options.output / FIGURE_FILE).is_file():
        print(f"{options.output / RESULT_FILE}: already made from the same weights and tokens")
        return
    if encoder is not None:
        tokens.encoder_features = features_of(encoder, tokens, tokenizer)
    data = code_use(tokens.codes, tokenizer.codebook_size) | {"mean_vector_cosine": mean_vector_cosine(tokens)}
    results = {name: analysis(model.to(device).eval(), tokens, options.seed, name) for name, model in models.items()}
    figures = {"tokens": {"source": tokens.source, **data}, "code_shape": tokenizer.code_shape, "models": results}
    draw(figures, options.output / FIGURE_FILE)
    write_record(options.output / RESULT_FILE, provenance, figures=figures)
    print(
        f"{len(tokens)} images of {tokens.source}",
        table(figures),
        f"look at {options.output / FIGURE_FILE}",
        sep="\n\n",
    )


def load_model(source: str, overrides: list[str], tokenizer: Tokenizer) -> ReAR:
    """Raises InputError for weights of a different tokenizer, or of a model of different sequences."""
    weights, config = find_generator_weights(load_run_config(source, overrides), tokenizer.sha256())
    model = load_generator(weights.path, config.model)
    expected, found = ((one.image_seq_len, one.codebook_size) for one in (tokenizer, model))
    if found != expected:
        raise InputError(f"{source}: found (tokens per image, codebook size) {found}, expected {expected}")
    return model


def encoder_of(name: str, tokenizer: Tokenizer) -> FrozenEncoder:
    if not tokenizer.has_images:
        raise tokenizer.no_images(f"--encoder {name}")
    grid = tokenizer.code_shape
    if len(grid) != 2 or grid[0] != grid[1]:
        raise InputError(f"--encoder {name}: found tokens of shape {grid}, expected a square grid")
    return open_encoder(name, grid_size=grid[0])


def read_tokens(config: Config, path: str | None, count: int, tokenizer: Tokenizer, device: torch.device) -> Tokens:
    """Up to `count` images at equal steps of the data; images are tokenized."""
    data, source = open_tokens_of(config, path, tokenizer.sha256())
    rows = evenly_spaced(len(data), min(count, len(data)))
    if len(rows) < 2:
        raise InputError(f"{source}: found {len(data)} images, expected at least 2")
    items = [rows[start : start + SEQUENCES_AT_ONCE] for start in range(0, len(rows), SEQUENCES_AT_ONCE)]
    codes, class_labels = [], []
    for batch in tqdm(Batches(data, items, config.dataset.params.num_workers_per_gpu), "tokens", len(items), delay=2):
        moved = on_device(batch, device)
        codes.append((moved["codes"] if "codes" in moved else tokenizer.encode(moved["image"])).long())
        class_labels.append(moved["class_labels"])
    all_codes = torch.cat(codes)
    vocabulary = torch.arange(tokenizer.codebook_size, device=device)
    return Tokens(
        codes=all_codes,
        class_labels=torch.cat(class_labels),
        corrupted=perturbed(all_codes, tokenizer.codebook_size),
        codebook=tokenizer.codebook_lookup(vocabulary[None])[0].detach(),
        source=source,
        fingerprint=hash_of({"data": data.fingerprint, "rows": rows}),
    )


def open_tokens_of(config: Config, path: str | None, tokenizer_sha256: str) -> tuple[TrainingSet, str]:
    """The data, and their name for the user."""
    params = config.dataset.params
    if path is not None:
        params = replace(params, pretokenization=path, train_shards_path_or_url=None)
        given = replace(config, dataset=replace(config.dataset, params=params))
        return open_training_data(given, tokenizer_sha256, verify=False), path
    validating = replace(config, experiment=replace(config.experiment, eval_every=1))
    data = open_validation_data(validating, tokenizer_sha256)
    if data is not None:
        return data, f"validation data {params.eval_pretokenization or params.eval_shards_path_or_url}"
    if params.pretokenization is None:
        raise InputError("--tokens: missing; the config names no tokens and no validation images")
    return open_training_data(config, tokenizer_sha256, verify=False), f"training tokens {params.pretokenization}"


def features_of(encoder: FrozenEncoder, tokens: Tokens, tokenizer: Tokenizer) -> Tensor:
    """Patch features (n, N, Z') of the decoded images."""
    batches = tqdm(tokens.batches, encoder.name, unit="batch", delay=2)
    return torch.cat([encoder.patch_features(tokenizer.decode(tokens.codes[rows])).float() for rows in batches])


def analysis(model: ReAR, tokens: Tokens, seed: int, name: str) -> dict[str, Any]:
    """All numbers of a model, for the JSON."""
    fit, test = tokens.halves
    num_batches = (3 + 2 * len(SWAP_RATES)) * len(tokens.batches) + len(fit) + 2 * len(test)
    with tqdm(total=num_batches, desc=name, unit="batch") as progress:
        clean = predict(model, tokens, tokens.codes, progress)
        corrupted = predict(model, tokens, tokens.corrupted, progress)
        samples, sampled_labels = sample(model, len(tokens), seed, progress)
        on_samples = [predictions(model, samples[rows], samples[rows], sampled_labels[rows]) for rows in tokens.batches]
        return {
            "accuracy": {
                "clean": by_position(clean, lambda one: one.correct),
                "corrupted": by_position(corrupted, lambda one: one.correct),
            },
            "loss": {
                "clean": by_position(clean, lambda one: one.loss),
                "corrupted": by_position(corrupted, lambda one: one.loss),
            },
            **representation(model, tokens, progress),
            "loss_with_swapped_tokens": {"rates": SWAP_RATES, **robustness(model, tokens, progress)},
            "prediction_entropy": {
                "tokens": by_position(clean, lambda one: one.entropy),
                "samples": by_position(on_samples, lambda one: one.entropy),
            },
            "samples": code_use(samples, model.codebook_size)
            | {"distance_to_tokens": distance_of_use(samples, tokens.codes, model.codebook_size)},
        }


def predict(model: ReAR, tokens: Tokens, context: Tensor, progress: tqdm) -> list[Predictions]:
    """Predict the clean codes from a context (n, N), batch by batch."""
    found = []
    for rows in tokens.batches:
        found.append(predictions(model, context[rows], tokens.codes[rows], tokens.class_labels[rows]))
        progress.update()
    return found


def sample(model: ReAR, count: int, seed: int, progress: tqdm) -> tuple[Tensor, Tensor]:
    """Sample codes (count, N) from the model; returns them with their class labels."""
    samples = ModelSamples(model, seed, Stream.ANALYSIS)
    parts = []
    for start in range(0, count, SEQUENCES_AT_ONCE):
        parts.append(samples(range(start, min(start + SEQUENCES_AT_ONCE, count))))
        progress.update()
    codes, class_labels = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(class_labels)


def representation(model: ReAR, tokens: Tokens, progress: tqdm) -> dict[str, Any]:
    """Linear CKA by block, with codebook vectors and encoder features; cosines of recovered codebook vectors by block
    and position."""
    halves = [covariances(model, tokens, half, progress) for half in tokens.halves]
    both = {key: halves[0][key] + halves[1][key] for key in halves[0]}
    layers = range(len(model.blocks))
    maps = {key: halves[0][key].linear_map() for key in halves[0] if key[0] in POSITIONS}
    cosines = {key: torch.zeros(tokens.codes.shape[1], dtype=torch.float64) for key in maps}
    count = 0
    for rows in tokens.halves[1]:
        states = hidden_states(model, tokens.codes[rows], tokens.class_labels[rows])
        vectors = F.embedding(tokens.codes[rows], tokens.codebook).double()  # (B, N, Z)
        for (kind, layer), recover in maps.items():
            recovered = recover(states[layer][:, POSITIONS[kind]])
            cosines[kind, layer] += F.cosine_similarity(recovered, vectors, dim=-1).sum(0).cpu()
        count += len(vectors)
        progress.update()
    kinds = dict.fromkeys(kind for kind, _ in both)
    return {
        "cka": {kind: [both[kind, layer].cka() for layer in layers] for kind in kinds},
        "recovered_cosine": {kind: [(cosines[kind, layer] / count).tolist() for layer in layers] for kind in POSITIONS},
    }


def mean_vector_cosine(tokens: Tokens) -> float:
    """The cosine that a constant reaches: the mean vector of one half, compared with the vectors of the other half."""
    fit, test = (F.embedding(tokens.codes[torch.cat([*half])], tokens.codebook) for half in tokens.halves)
    return float(F.cosine_similarity(fit.mean((0, 1)), test, dim=-1).mean())


def covariances(
    model: ReAR, tokens: Tokens, batches: Sequence[Tensor], progress: tqdm
) -> dict[tuple[str, int], Covariances]:
    """Covariances of each block's output with the codebook vectors of the current token ("own") and of the predicted
    token ("next"), and with the features of the current token's patch ("encoder")."""
    found: dict[tuple[str, int], Covariances] = {}
    for rows in batches:
        targets = dict.fromkeys(POSITIONS, F.embedding(tokens.codes[rows], tokens.codebook))  # (B, N, Z)
        if tokens.encoder_features is not None:
            targets["encoder"] = tokens.encoder_features[rows]
        for layer, state in enumerate(hidden_states(model, tokens.codes[rows], tokens.class_labels[rows])):
            for kind, vectors in targets.items():
                hidden = state[:, POSITIONS.get(kind, POSITIONS["own"])]
                found.setdefault((kind, layer), Covariances()).add(hidden.flatten(0, 1), vectors.flatten(0, 1))
        progress.update()
    return found


def robustness(model: ReAR, tokens: Tokens, progress: tqdm) -> dict[str, list[float]]:
    """Mean loss of the clean codes for each of `SWAP_RATES`, the fraction of context codes that are replaced: by random
    codes or, at the same positions, by the codes with the nearest codebook vectors."""
    neighbours = nearest_codes(tokens.codebook)
    uniforms = validation_uniforms(range(len(tokens)), num_perturbation_uniforms(tokens.codes.shape[1]))
    uniforms[:, 0] = 1  # the same rate in all images
    uniforms = uniforms.to(tokens.codes.device)
    losses: dict[str, list[float]] = {"random": [], "nearest": []}
    for rate in SWAP_RATES:
        random = switch_codes(tokens.codes, uniforms, rate, len(tokens.codebook))[0]
        nearest = torch.where(perturbation_mask(uniforms, rate), neighbours[tokens.codes], tokens.codes)
        for kind, context in (("random", random), ("nearest", nearest)):
            found = predict(model, tokens, context, progress)
            losses[kind].append(float(np.mean(by_position(found, lambda one: one.loss))))
    return losses


def code_use(codes: Tensor, codebook_size: int) -> dict[str, Any]:
    """Statistics of codes (n, N): entropy of frequencies in bits, share of the codebook used, sorted frequencies."""
    counts = counts_of(codes, codebook_size)
    statistics = CodeStatistics(counts, class_counts=np.zeros(0))
    frequencies = np.sort(counts)[::-1] / counts.sum()
    return {"entropy": statistics.entropy, "usage": statistics.usage, "frequencies": frequencies.tolist()}


def counts_of(codes: Tensor, codebook_size: int) -> np.ndarray:
    return codes.flatten().bincount(minlength=codebook_size).cpu().numpy()


def distance_of_use(codes: Tensor, others: Tensor, codebook_size: int) -> float:
    """Total variation distance of the code frequencies of two sets of codes: 0 to 1."""
    shares = [counts / counts.sum() for counts in (counts_of(one, codebook_size) for one in (codes, others))]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def table(figures: dict[str, Any]) -> str:
    """A row per model."""
    head = ["model", "accuracy", "corrupted", "loss", "corrupted", "best cosine own", "next", "samples' entropy", "use"]
    lines = []
    for name, result in figures["models"].items():
        means = [np.mean(result[key][kind]) for key in ("accuracy", "loss") for kind in ("clean", "corrupted")]
        best = [max(np.mean(of_layer) for of_layer in result["recovered_cosine"][kind]) for kind in POSITIONS]
        numbers = [f"{means[0]:.2%}", f"{means[1]:.2%}", *(f"{value:.4f}" for value in (*means[2:], *best))]
        samples = result["samples"]
        lines.append([name, *numbers, f"{samples['entropy']:.3f}", f"{samples['usage']:.1%}"])
    data = figures["tokens"]
    lines.append(["the tokens", *["-"] * 6, f"{data['entropy']:.3f}", f"{data['usage']:.1%}"])
    return markdown_table(head, lines)


if __name__ == "__main__":
    with input_errors_exit():
        main()
