"""Weights for sampling and for fine-tuning: strict, but for training-only modules and the embeddings of the classes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling.loading import init_from_weights, load_generator
from modeling.rear import ReAR
from modeling.taps import is_projector
from utils.errors import InputError
from utils.files.weights import save_weights
from utils.schema import ModelConfig, TapConfig


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sampling_needs_all_but_the_training_only_modules(
    tiny_config: ModelConfig, tiny_model: ReAR, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"model.{suffix}"
    state = tiny_model.state_dict()
    save_weights(state, path) if suffix == "safetensors" else torch.save(state, path)
    loaded = load_generator(path, tiny_config)
    assert loaded.taps == []
    kept = {key: value for key, value in state.items() if not is_projector(key)}
    assert loaded.state_dict().keys() == kept.keys() < state.keys()
    assert all(torch.equal(loaded.state_dict()[key], kept[key]) for key in kept)

    save_weights(kept, tmp_path / "exported.safetensors")
    exported = load_generator(tmp_path / "exported.safetensors", tiny_config)
    assert torch.equal(exported.lm_head.weight, state["lm_head.weight"])
    del state["lm_head.bias"]
    save_weights(state, tmp_path / "short.safetensors")
    with pytest.raises(InputError, match=r"short\.safetensors.*lm_head\.bias"):
        load_generator(tmp_path / "short.safetensors", tiny_config)


def test_projectors_of_any_name_are_left_out_and_nothing_else(
    tiny_config: ModelConfig, tiny_model: ReAR, tmp_path: Path
) -> None:
    path, state = tmp_path / "w.safetensors", tiny_model.state_dict()
    save_weights(state | {"repa_align_mlp.0.weight": torch.ones(2, 3)}, path)
    assert torch.equal(load_generator(path, tiny_config).lm_head.weight, tiny_model.lm_head.weight)
    for key in ("blocks.0.encode_align_mlp.0.weight", "repa_projector.weight"):
        save_weights(state | {key: torch.ones(2, 3)}, path)
        with pytest.raises(InputError, match=key):
            load_generator(path, tiny_config)


def test_projectors_are_the_difference_between_training_and_sampling(tiny_config: ModelConfig) -> None:
    tiny_config.generator.taps = [TapConfig("repa", target="encoder", source="timm:x", z_dim=7)]
    trained = {name for name, _ in ReAR(tiny_config).named_children()}
    sampled = {name for name, _ in ReAR(ReAR.sampling_config(tiny_config)).named_children()}
    assert trained - sampled == {"encode_align_mlp", "decode_align_mlp", "repa_align_mlp"}
    assert all(map(is_projector, trained - sampled))
    assert not any(map(is_projector, sampled))
    assert ReAR.sampling_config(tiny_config).generator.taps == []  # whose sources may be files of this machine


def test_fine_tuning_keeps_all_but_the_classes(tiny_config: ModelConfig, tiny_model: ReAR, tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    save_weights(tiny_model.state_dict(), source)
    model = ReAR(replace(tiny_config, generator=replace(tiny_config.generator, condition_num_classes=3)))
    classes = model.embeddings.weight[25:28].clone()
    init_from_weights(model, source)
    trained = tiny_model.state_dict()
    for key, value in model.state_dict().items():
        if key != "embeddings.weight":
            assert torch.equal(value, trained[key]), key
    table, old = model.embeddings.weight, trained["embeddings.weight"]
    assert torch.equal(table[:25], old[:25])  # codes and mask
    assert torch.equal(table[25:28], classes)
    assert torch.equal(table[28], old[30])  # null class

    wider = ReAR(replace(tiny_config, vq_model=replace(tiny_config.vq_model, codebook_size=25)))
    with pytest.raises(InputError, match=r"model\.safetensors: .*lm_head"):
        init_from_weights(wider, source)
    del trained["encode_align_mlp.0.bias"]
    save_weights(trained, source)
    with pytest.raises(InputError, match=r"1 missing \(encode_align_mlp\.0\.bias\)"):
        init_from_weights(model, source)
