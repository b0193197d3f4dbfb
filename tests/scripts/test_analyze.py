"""The numbers of an analysis against the validator, hand computations and models with known properties."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.representation import Covariances
from evaluation.validator import ValidationTokens, perturbed, validation_losses
from modeling.analysis import POSITIONS, hidden_states
from modeling.loading import load_tokenizer
from modeling.rear import ReAR
from modeling.sampling.model_samples import ModelSamples
from scripts import analyze
from utils.config import load_config, save_config
from utils.distributed import init_distributed
from utils.errors import InputError
from utils.files.weights import save_weights
from utils.randomness import Stream, validation_uniforms
from utils.schema import Config


@pytest.fixture(scope="module")
def config(tiny_arguments: list[str]) -> Config:
    return load_config([*tiny_arguments, "experiment.output_dir=unused", "model.generator.guidance_scale=3"])


def make_model(config: Config, trained: bool) -> ReAR:
    """An untrained model has blocks that are the identity; else all weights are random."""
    torch.manual_seed(0)
    model = ReAR(config.model)
    if trained:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def runs(config: Config, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("untrained", "random"):
        (folder / name).mkdir()
        save_weights(make_model(config, trained=name == "random").state_dict(), folder / name / "model.safetensors")
        save_config(config, folder / name / "config.yaml")
    return [str(folder / "untrained"), str(folder / "random")]


@pytest.fixture(scope="module")
def found(runs: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("analysis")
    analyze.main([*runs, "--output", str(folder)])
    assert (folder / "analysis.png").stat().st_size > 30_000
    return json.loads((folder / "analysis.json").read_text())


@pytest.fixture(scope="module")
def tokens(config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (50, 16), labels and codebook of the tiny project."""
    rows = [json.loads(line) for line in Path(str(config.dataset.params.pretokenization)).read_text().splitlines()]
    codes, labels = torch.tensor([row["tokens"] for row in rows]), torch.tensor([row["class_id"] for row in rows])
    return codes, labels, load_tokenizer(config).codebook_lookup(torch.arange(24)[None])[0]


def test_losses_are_those_of_the_validator(found: dict, config: Config, tokens: tuple[Tensor, ...]) -> None:
    codes, labels, _ = tokens
    validation = ValidationTokens(codes.int(), perturbed(codes.int(), 24), labels)
    with init_distributed() as ctx:
        expected = validation_losses(make_model(config, trained=True), validation, config, ctx)
    result = found["models"]["random"]
    assert result["loss"]["clean"] == pytest.approx(expected.by_position.tolist(), rel=1e-5)
    assert np.mean(result["accuracy"]["clean"]) == pytest.approx(expected.correct_tokens)
    assert np.mean(result["loss"]["corrupted"]) == pytest.approx(expected.ar_loss_perturbed, rel=1e-5)
    # The same share of the context, replaced in the same way.
    assert result["loss_with_swapped_tokens"]["random"][0] == pytest.approx(expected.ar_loss_perturbed, rel=1e-5)


def test_an_untrained_model_knows_the_current_code_only(found: dict, tokens: tuple[Tensor, ...]) -> None:
    """Its blocks are the identity: the codebook vector is a linear function of the code's embedding."""
    result = found["models"]["untrained"]
    own, following = (np.array(result["recovered_cosine"][kind]) for kind in ("own", "next"))
    assert own.shape == (2, 16)
    assert own.mean() > 0.8  # codes and positions together have more than 32 dimensions
    vectors = tokens[2][tokens[0]]
    constant = F.cosine_similarity(vectors[::2].mean((0, 1)), vectors[1::2], dim=-1).mean().item()
    assert found["tokens"]["mean_vector_cosine"] == pytest.approx(constant, rel=1e-5)
    assert following.mean() < constant + 0.1
    assert min(result["cka"]["own"]) > 5 * max(result["cka"]["next"])


def test_cka_is_that_of_all_positions(found: dict, config: Config, tokens: tuple[Tensor, ...]) -> None:
    codes, labels, codebook = tokens
    states = hidden_states(make_model(config, trained=True), codes, labels)
    for kind, positions in POSITIONS.items():
        expected = []
        for state in states:
            covariances = Covariances()
            covariances.add(state[:, positions].flatten(0, 1), codebook[codes].flatten(0, 1))
            expected.append(covariances.cka())
        assert found["models"]["random"]["cka"][kind] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_nearest_codes_replace_the_context_where_random_ones_do(
    found: dict, config: Config, tokens: tuple[Tensor, ...]
) -> None:
    codes, labels, codebook = tokens
    distances = torch.cdist(codebook, codebook)
    nearest = distances.fill_diagonal_(torch.inf).argmin(1)
    losses = found["models"]["random"]["loss_with_swapped_tokens"]
    assert losses["rates"] == [0.1, 0.25, 0.5]
    for rate, loss in zip(losses["rates"], losses["nearest"], strict=True):
        replaced = validation_uniforms(range(50), 33)[:, 1:17] < rate
        context = torch.where(replaced, nearest[codes], codes)
        logits = make_model(config, trained=True)(context, labels).logits
        assert loss == pytest.approx(F.cross_entropy(logits.mT, codes).item(), rel=1e-5)


@torch.no_grad()
def test_entropies_of_predictions(found: dict, config: Config, tokens: tuple[Tensor, ...]) -> None:
    model = make_model(config, trained=True)
    contexts = {"tokens": tokens[:2], "samples": ModelSamples(model, 1, Stream.ANALYSIS)(range(50))}
    for name, (codes, labels) in contexts.items():
        expected = torch.distributions.Categorical(logits=model(codes, labels).logits).entropy().mean(0)
        assert found["models"]["random"]["prediction_entropy"][name] == pytest.approx(expected.tolist(), rel=1e-5)


def test_samples_are_compared_with_the_tokens(found: dict, config: Config, tokens: tuple[Tensor, ...]) -> None:
    codes = ModelSamples(make_model(config, trained=True), 1, Stream.ANALYSIS)(range(50))[0]
    shares = [np.bincount(one.flatten().numpy(), minlength=24) / 800 for one in (codes, tokens[0])]
    use = found["models"]["random"]["samples"]
    assert use["frequencies"] == pytest.approx(sorted(shares[0], reverse=True))
    assert use["usage"] == (shares[0] > 0).mean()
    used = shares[0][shares[0] > 0]
    assert use["entropy"] == pytest.approx(-(used * np.log2(used)).sum())
    assert use["distance_to_tokens"] == pytest.approx(abs(shares[0] - shares[1]).sum() / 2)
    assert found["tokens"]["frequencies"] == pytest.approx(sorted(shares[1], reverse=True))


class Averages:
    """In place of a frozen encoder: the mean colour of each patch."""

    name = "averages"

    def __str__(self) -> str:
        return self.name

    def to(self, device: torch.device) -> "Averages":
        return self

    def patch_features(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 4).flatten(2).mT


def test_features_of_an_encoder(
    runs: list[str],
    config: Config,
    tokens: tuple[Tensor, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(analyze, "open_encoder", lambda name, grid_size: Averages())
    codes, labels, _ = tokens
    store = str(config.dataset.params.pretokenization)
    arguments = [runs[1], "--output", str(tmp_path), "--encoder", "averages", "--tokens", store, "--n", "20"]
    analyze.main(arguments)
    rows = [i * 50 // 20 for i in range(20)]
    features = Averages().patch_features(load_tokenizer(config).decode(codes[rows]))
    covariances = Covariances()
    state = hidden_states(make_model(config, trained=True), codes[rows], labels[rows])[1]
    covariances.add(state[:, 2:].flatten(0, 1), features.flatten(0, 1))
    result = json.loads((tmp_path / "analysis.json").read_text())["models"]["random"]
    assert result["cka"]["encoder"][1] == pytest.approx(covariances.cka(), rel=1e-4)
    capsys.readouterr()
    analyze.main(arguments)
    assert "already made" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists with another provenance"):
        analyze.main([*arguments[:-1], "21"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.seed=1"], "found no CHECKPOINT"),
        (["{0}", "{0}"], "given twice"),
        (["{0}", "--n", "1"], "--n 1: expected at least 2"),
        (["{0}", "--tokens", "x.npz"], r"x.npz: expected a .jsonl file or a .tokens store"),
        (["{0}", "model.vq_model.model_type=codes_only"], "does not fit CodesOnly"),
        (["{0}", "--encoder", "resnet"], "encoder 'resnet': expected efficientnet_lite0 or timm:NAME"),
    ],
)
def test_refused_inputs(runs: list[str], arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        analyze.main([*(word.format(*runs) for word in arguments), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out/analysis.json").exists()
