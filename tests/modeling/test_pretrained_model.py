"""Models as folders: equal after saving and loading."""

import copy
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard

from modeling.pretrained_model import PretrainedModel
from modeling.rear import ReAR
from modeling.taps import is_projector
from modeling.tokenizers.registry import TOKENIZERS, build_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from tests.hub_server import local_hub
from tests.modeling.tokenizers.test_conformance import SIZES
from utils.config import load_config
from utils.errors import InputError
from utils.files.weights import load_state_dict, save_weights


def check_equal(model: PretrainedModel, other: PretrainedModel) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert model.config == other.config


def test_a_model_with_its_projectors(tiny_model: ReAR, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "x")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = ReAR.from_pretrained(tmp_path / "x")
    assert any("_align_mlp" in key for key in loaded.state_dict())
    assert not loaded.training
    for other in (loaded, ReAR.from_pretrained(str(tmp_path / "x")), copy.deepcopy(loaded)):
        check_equal(tiny_model, other)
    card = ModelCard.load(tmp_path / "x/README.md")
    assert card.data.license is None
    assert "More Information Needed" not in card.content


def test_weights_need_no_projector_and_may_have_others(tiny_model: ReAR, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    weights = load_state_dict(tmp_path / "model.safetensors")
    without = {key: value for key, value in weights.items() if not is_projector(key)}
    only_decode = {key: value for key, value in weights.items() if not key.startswith("encode_align_mlp")}
    for state, names in ((without, []), (only_decode, ["decode"])):
        save_weights(state | {"other_align_mlp.0.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
        loaded = ReAR.from_pretrained(tmp_path)
        assert [tap.name for tap in loaded.taps] == names
        assert loaded.state_dict().keys() == state.keys()
        codes, labels = torch.arange(16)[None], torch.tensor([1])
        assert torch.equal(loaded(codes, labels).logits, tiny_model(codes, labels).logits)
    del only_decode["decode_align_mlp.0.bias"]
    save_weights(only_decode, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 missing \(decode_align_mlp\.0\.bias\)"):
        ReAR.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", SIZES)
def test_every_tokenizer(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer: Tokenizer = build_tokenizer(SIZES[name])
    tokenizer.save_pretrained(tmp_path)
    check_equal(tokenizer, TOKENIZERS[SIZES[name].model_type].from_pretrained(tmp_path))
    load_config([f"config={tmp_path / 'config.json'}", "experiment.output_dir=unused"], reads={})


def test_of_another_class(tiny_model: ReAR, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.safetensors: does not fit CodesOnly as configured: 1 missing"):
        TOKENIZERS["codes_only"].from_pretrained(tmp_path)


def test_pushed_by_itself(tiny_model: ReAR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_hub() as hub:
        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
            tiny_model.push_to_hub("someone/model", token="hf_of_nobody")
        assert hub.files["someone/model"].keys() == {"README.md", "config.json", "model.safetensors"}
        loaded = ReAR.from_pretrained("someone/model", endpoint=hub.endpoint, cache_dir=tmp_path)
    check_equal(tiny_model, loaded)
