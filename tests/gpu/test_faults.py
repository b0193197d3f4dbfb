"""The dry run finds faults: each is written into the source of the product and must make it fail."""

import inspect
import textwrap
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from modeling.rear import ReAR
from modeling.sampling import cached_decoding
from modeling.sampling.cached_decoding import KVCache
from modeling.tokenizers.tokenizer import Tokenizer
from tests.gpu.fake_gpu import FakeGpu
from tests.gpu.test_dry_run import decode, sampler, train
from utils.schema import Config


def plant(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, found: str, fault: str) -> None:
    """Put `fault` in place of `found` in the source of a function."""
    function = getattr(place, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert found in source
    changed: dict[str, Any] = {}
    exec(source.replace(found, fault), function.__globals__, changed)
    monkeypatch.setattr(place, name, changed[name])


@pytest.mark.parametrize(
    ("name", "found", "fault"),
    [
        ("embed_newest", "state.position - 2", "(state.position - 2).cpu()"),
        ("after_last_attention", "rows)[:, 0]", "rows)[[0] * len(x), 0]"),  # an index from the host
        ("rows_of_modulations", "% MODULATED", "% MODULATED * torch.tensor(1)"),
        ("embed_newest", "state.position)", "state.position + state.position.item())"),
        ("embed_newest", "if masked:", "if masked and state.position < 32:"),  # asks for a value
        ("after_last_attention", "modulate(x,", "modulate(x.double(),"),
        ("embed_newest", "device=x.device", "device='cpu'"),
        ("embed_newest", "dtype=state.dtype", "dtype=torch.float32"),
        ("attend", "mask, scale", "mask.clone().pin_memory(), scale"),
    ],
)
def test_a_fault_in_the_decode_step_is_found(
    gpu: FakeGpu, config: Config, model: ReAR, monkeypatch: pytest.MonkeyPatch, name: str, found: str, fault: str
) -> None:
    _, state = sampler(gpu, model, config, torch.bfloat16)
    decode(gpu, state, masked=True)
    plant(monkeypatch, KVCache if name == "attend" else cached_decoding, name, found, fault)
    state.set_compiled(False)  # it calls the functions of the module as they are now
    with pytest.raises((AssertionError, DataDependentOutputException)):
        decode(gpu, state, masked=True)


@pytest.mark.parametrize(
    ("name", "found", "fault"),
    [
        ("forward", "self.position_table(orders)", "self.position_table(orders).double()"),
        ("_embed_class", "1 + class_labels", "1 + class_labels.cpu()"),
    ],
)
def test_a_fault_in_training_is_found(
    gpu: FakeGpu,
    config: Config,
    model: ReAR,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    found: str,
    fault: str,
) -> None:
    plant(monkeypatch, ReAR, name, found, fault)
    with pytest.raises(AssertionError):
        train(gpu, model, tokenizer, config, from_images=False)
