import dataclasses

import pytest
import torch

from modeling.rear import ReAR
from utils.schema import GeneratorConfig, ModelConfig, TapConfig


@pytest.mark.parametrize(
    ("hidden_size", "layers", "mlp", "millions"),
    [(768, 20, 3072, 218.4), (768, 24, 3072, 260.9), (1024, 24, 4096, 461.7)],
)
def test_published_parameter_counts(hidden_size: int, layers: int, mlp: int, millions: float) -> None:
    config = ModelConfig(
        generator=GeneratorConfig(
            hidden_size=hidden_size, num_hidden_layers=layers, intermediate_size=mlp, transition_alignment=False
        )
    )
    with torch.device("meta"):
        model = ReAR(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_no_position_sees_its_own_target_or_later_codes(tiny_model: ReAR) -> None:
    codes = torch.randint(0, 24, (1, 16))
    changed = codes.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 24
    labels = torch.tensor([2])
    before, after = tiny_model(codes, labels), tiny_model(changed, labels)
    # Row i predicts x(i+1) from the class and x1 .. xi, so rows 0 .. 9 must not change and row 10 must.
    torch.testing.assert_close(before.logits[:, :10], after.logits[:, :10])
    torch.testing.assert_close(before.projections["decode"][:, :10], after.projections["decode"][:, :10])
    torch.testing.assert_close(before.projections["encode"][:, :9], after.projections["encode"][:, :9])
    assert (before.logits[:, 10] - after.logits[:, 10]).abs().max() > 1e-3
    assert (before.projections["encode"][:, 9] - after.projections["encode"][:, 9]).abs().max() > 1e-3


def test_class_and_mask_have_rows_of_their_own(tiny_model: ReAR) -> None:
    codes = torch.zeros(7, 16, dtype=torch.long)
    codes[6] = tiny_model.mask_code
    logits = tiny_model(codes, torch.tensor([0, 1, 2, 3, 4, tiny_model.num_classes, 0])).logits
    assert len({tuple(row.tolist()) for row in logits[:, -1].detach().round(decimals=4)}) == 7


def test_a_new_model_predicts_uniformly(tiny_config: ModelConfig) -> None:
    """adaLN-zero: at the start the blocks are the identity and the logits are small."""
    model = ReAR(tiny_config).eval()
    logits = model(torch.randint(0, 24, (2, 16)), torch.tensor([0, 5])).logits
    assert logits.abs().max() < 0.8
    assert not model.blocks[0].adaLN_modulation[1].weight.any()
    assert not model.cls_token.any()


def test_plain_ar_is_the_same_code_without_projectors(tiny_config: ModelConfig, tiny_model: ReAR) -> None:
    generator = dataclasses.replace(tiny_config.generator, transition_alignment=False)
    plain = ReAR(dataclasses.replace(tiny_config, generator=generator)).eval()
    plain.load_state_dict({k: v for k, v in tiny_model.state_dict().items() if "_align_mlp" not in k})
    codes, labels = torch.randint(0, 24, (2, 16)), torch.tensor([1, 4])
    output = plain(codes, labels)
    assert output.projections == {}
    torch.testing.assert_close(output.logits, tiny_model(codes, labels).logits)


def test_activation_checkpointing_changes_no_gradient(tiny_config: ModelConfig, tiny_model: ReAR) -> None:
    codes, labels = torch.randint(0, 24, (2, 16)), torch.tensor([1, 4])
    gradients = []
    for use_checkpoint in (False, True):
        tiny_model.use_checkpoint = use_checkpoint
        tiny_model.train().zero_grad()
        tiny_model(codes, labels).logits.square().mean().backward()
        gradients.append(tiny_model.blocks[0].mlp.fc1.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_modulations_once_per_class_change_neither_outputs_nor_gradients(tiny_model: ReAR) -> None:
    codes, labels = torch.randint(0, 24, (6, 16)), torch.tensor([4, 1, 5, 1, 4, 1])  # 5: the null class
    results = []
    for class_labels, class_rows in ((labels, None), labels.unique(return_inverse=True)):
        tiny_model.zero_grad()
        output = tiny_model(codes, class_labels, class_rows=class_rows)
        encode, decode = output.projections.values()
        (output.logits.square().mean() + encode.mean() + decode.mean()).backward()
        results.append([output.logits, encode, *(p.grad.clone() for p in tiny_model.parameters())])
    for of_each, of_classes in zip(*results, strict=True):
        torch.testing.assert_close(of_each, of_classes, rtol=1e-4, atol=1e-6)
    assert results[0][0][0].sub(results[0][0][4]).abs().max() > 1e-3  # images of one class have their own codes


def weights_of(config: ModelConfig, seed: int = 3, **changes: object) -> dict[str, torch.Tensor]:
    generator = dataclasses.replace(config.generator, **changes)
    torch.manual_seed(seed)
    return ReAR(dataclasses.replace(config, generator=generator)).state_dict()


def test_arms_of_a_study_start_from_the_same_common_weights(tiny_config: ModelConfig) -> None:
    rear = weights_of(tiny_config, init_projectors_last=True)
    tap = TapConfig("repa", target="encoder", z_dim=12, layer=1)
    others = {
        "ar": weights_of(tiny_config, init_projectors_last=True, transition_alignment=False),
        "repa": weights_of(tiny_config, init_projectors_last=True, encode_align=False, decode_align=False, taps=[tap]),
        "permuted": weights_of(tiny_config, init_projectors_last=True, transition_alignment_target="permuted_codebook"),
        "rar": weights_of(tiny_config, init_projectors_last=True, order="annealed"),
        "ar, by default": weights_of(tiny_config, transition_alignment=False),
    }
    for name, found in others.items():
        common = rear.keys() & found.keys()
        assert len(common) >= len(rear) - 12, name  # all but the two projectors
        assert all(torch.equal(rear[key], found[key]) for key in common), name
    # As trained so far, the projectors of encode and decode term are drawn first.
    assert not torch.equal(weights_of(tiny_config)["lm_head.weight"], rear["lm_head.weight"])
