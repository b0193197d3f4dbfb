import typing

import pytest
import torch

from modeling.perturbation import PERTURBATIONS, anneal, mask_codes, perturb, perturbation_ratio, switch_codes
from utils.config import load_config
from utils.schema import GeneratorConfig, ModelConfig, VQModelConfig


def test_codes_are_replaced_at_the_ratio_by_codes_of_the_whole_codebook() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.full((2000, 64), 7)
    perturbed, mask = switch_codes(codes, torch.rand(2000, 129, generator=generator), 0.8, 16)
    share = mask.float().mean(dim=1)
    assert abs(share.mean() - 0.4) < 0.02  # eps ~ U(0, 0.8)
    assert share.min() < 0.05
    assert 0.7 < share.max() < 0.95
    assert torch.equal(perturbed[~mask], codes[~mask])
    counts = perturbed[mask].bincount(minlength=16)
    assert len(counts) == 16  # the old code 7 among them
    assert counts.min() > 0.9 * counts.float().mean()


def test_perturb_does_nothing_at_ratio_zero_and_can_mask() -> None:
    codes, uniforms = torch.arange(64)[None], torch.rand(1, 129)
    perturbed, mask = switch_codes(codes, uniforms, 0.0, 64)
    assert torch.equal(perturbed, codes)
    assert not mask.any()
    uniforms[:, 0] = 0.999
    perturbed, mask = mask_codes(codes, uniforms, 1.0, 64)
    assert mask.sum() > 50
    assert (perturbed[mask] == 64).all()


def test_the_mode_chooses_the_perturbation() -> None:
    codes, uniforms = torch.arange(64)[None] % 24, torch.rand(1, 129)
    uniforms[:, 0] = 0.999
    perturbed = {}
    for mode in ("switch", "mask", "none"):
        config = ModelConfig(VQModelConfig(codebook_size=24), GeneratorConfig(perturb_mode=mode))
        perturbed[mode], mask = perturb(codes, uniforms, 0.5, config)
        assert mask.any() == (mode != "none")
    assert perturbed["switch"].max() < 24
    assert perturbed["mask"].max() == 24
    assert torch.equal(perturbed["none"], codes)


def test_the_perturbations_that_the_paper_compares() -> None:
    """A fixed ratio of 0.25, and U(0, 0.5), both at every step."""
    codes, uniforms = torch.zeros(1000, 64, dtype=torch.int64), torch.rand(1000, 129, generator=torch.manual_seed(0))
    always = {"randomness_anneal_start": 10, "randomness_anneal_end": 10, "perturb_mode": "mask"}
    for maximum, fixed in ((0.25, True), (0.5, False)):
        generator = GeneratorConfig(perturb_ratio_max=maximum, perturb_ratio_fixed=fixed, **always)
        ratio = perturbation_ratio(9, generator)
        _, mask = perturb(codes, uniforms, ratio, ModelConfig(VQModelConfig(codebook_size=24), generator))
        share = mask.float().mean(dim=1)
        assert ratio == maximum
        assert abs(share.mean() - 0.25) < 0.01
        assert (share.std() < 0.06) == fixed  # of 64 codes; a drawn ratio adds to it
        assert perturbation_ratio(10, generator) == 0


def test_the_config_names_the_perturbations_of_the_table() -> None:
    for mode in PERTURBATIONS:
        config = load_config(["experiment.output_dir=unused", f"model.generator.perturb_mode={mode}"])
        assert config.model.generator.perturb_mode == mode
    choices = typing.get_args(typing.get_type_hints(GeneratorConfig)["perturb_mode"])
    assert set(choices) == set(PERTURBATIONS)


def test_perturbation_ratio_of_the_paper() -> None:
    for step in (0, 1_000, 62_500, 187_500, 250_000):
        assert anneal(step, 0, 187_500) == pytest.approx(max(0, 1 - 4 / 3 * step / 250_000))
    assert anneal(5, 10, 20) == 1
    assert anneal(15, 10, 20) == 0.5
    assert anneal(0, -1, -1) == 0  # the family's way to switch it off


def test_the_plain_model_is_not_perturbed_at_any_step() -> None:
    assert perturbation_ratio(0, GeneratorConfig(perturb_mode="none")) == 0
    assert perturbation_ratio(0, GeneratorConfig(perturb_mode="mask")) == 1
