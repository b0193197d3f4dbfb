"""The regularizer by hooks: equal to our own training step; mistakes of other code bases are errors."""

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from modeling.loading import load_tokenizer
from modeling.losses import next_token_loss
from modeling.perturbation import PERTURBATIONS, num_perturbation_uniforms
from modeling.rear import ReAR
from modeling.robust_embedding import ANNEAL_END, RobustEmbedding, alignment_loss, cosine_to_targets, mask_codes
from modeling.targets.registry import Targets
from modeling.training_step import training_step
from tests.processes import run_ranks
from utils.config import load_config
from utils.distributed import init_distributed
from utils.run.sharding import SHARDS_ON_CPU


class Toy(nn.Module):
    """Inputs (B, T) -> hidden states (B, T, 6); its blocks return tuples."""

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x + super().forward(x), None

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(9, 6)
        self.layers = nn.ModuleList(self.Layer(6, 6) for _ in range(3))
        self.reentrant: bool | None = None  # of activation checkpointing, if there is any

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embeddings(tokens)
        for layer in self.layers:
            x = (layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant))[0]
        return x


@pytest.fixture
def toy() -> Iterator[tuple[Toy, RobustEmbedding]]:
    torch.manual_seed(0)
    model, robust = Toy(), RobustEmbedding(torch.randn(9, 4), 6, projection_dim=5)
    robust.attach(model, encode="layers.0", decode="layers.2", prefix=2)
    return model, robust


@pytest.mark.parametrize("variant", ["as it is", "checkpointing", "compiled blocks", "bf16"])
@pytest.mark.parametrize("mode", ["switch", "mask"])
def test_on_our_model_it_is_our_training_step_bit_for_bit(tiny_arguments: list[str], variant: str, mode: str) -> None:
    """With dropout, and a weight other than 1."""
    own = [f"model.generator.perturb_mode={mode}", "model.generator.transition_alignment_weight=0.7"]
    own += [f"training.mixed_precision={'bf16' if variant == 'bf16' else 'no'}"]
    config = load_config([*tiny_arguments, "experiment.output_dir=unused", *own])
    config.model.generator.use_checkpoint = variant == "checkpointing"
    tokenizer, generator = load_tokenizer(config), torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    ours = ReAR(config.model)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = ours.state_dict()
    projectors = {key: state.pop(key) for key in [*state] if "_align_mlp." in key}
    without = dataclasses.replace(config.model.generator, transition_alignment=False)
    plain = ReAR(dataclasses.replace(config.model, generator=without))
    plain.load_state_dict(state)
    codebook = tokenizer.codebook_lookup(torch.arange(24)[None])[0]
    robust = RobustEmbedding(codebook, 32, projection_dim=16, weight=0.7, perturbation=PERTURBATIONS[mode])
    robust.load_state_dict(projectors)
    robust.attach(plain, encode="blocks.0", decode="blocks.1", prefix=2)
    if variant == "compiled blocks":
        for block in (*ours.blocks, *plain.blocks):
            block.compile(backend="eager")

    codes, labels = torch.randint(24, (6, 16), generator=generator), torch.arange(6) % 5
    uniforms = torch.rand(6, num_perturbation_uniforms(16), generator=generator)
    batch = {"codes": codes, "class_labels": labels, "class_rows": torch.arange(6), "perturbation_uniforms": uniforms}
    torch.manual_seed(2)
    loss = training_step(ours, tokenizer, batch, 20 / 30, config, Targets(config, tokenizer)).loss
    loss.backward()
    torch.manual_seed(2)
    perturbed, mask = robust.perturb(codes, progress=10 / 40, uniforms=uniforms)
    assert 0.1 < mask.float().mean() < 0.6
    with torch.autocast("cpu", torch.bfloat16, enabled=variant == "bf16"):
        logits = plain(perturbed, labels, class_rows=torch.arange(6)).logits
    found = next_token_loss(logits, codes) + robust.loss(codes, mask)
    found.backward()
    assert torch.equal(found, loss)
    gradients = {name: parameter.grad for module in (plain, robust) for name, parameter in module.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


def train_on_ranks(wrappers: tuple[str, ...]) -> None:
    """Half of a batch on each of two ranks, with the projectors in the model, against the whole batch."""
    codes = torch.arange(20).view(4, 5) % 9
    tokens = torch.cat([torch.zeros(4, 2, dtype=torch.int64), codes], dim=1)

    def gradients(wrapper: str, part: slice) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Toy()
        model.robust = RobustEmbedding(torch.randn(9, 4), 6, projection_dim=5)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        model.robust.attach(model, encode="layers.0", decode="layers.2", prefix=2)
        called = DistributedDataParallel(model) if wrapper == "ddp" else model
        if wrapper == "fsdp":
            for module in (*model.layers, model):
                fully_shard(module)
        loss = called(tokens[part]).square().mean() + model.robust.loss(codes[part])
        loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        return {name: grad.full_tensor() if wrapper == "fsdp" else grad for name, grad in found.items()}

    wanted = gradients("none", slice(None))
    assert len(wanted) == 7 + 12
    with init_distributed() as ctx:
        for wrapper in wrappers:
            found = gradients(wrapper, slice(2 * ctx.rank, 2 * ctx.rank + 2))
            for name, gradient in wanted.items():
                torch.testing.assert_close(found[name], gradient, msg=f"{wrapper} {name}")


@pytest.mark.multiprocess
def test_on_several_processes_gradients_of_the_projectors_are_averaged_too() -> None:
    run_ranks(train_on_ranks, ("ddp", "fsdp") if SHARDS_ON_CPU else ("ddp",), processes=2)


@pytest.mark.parametrize("last_code", [True, False])
def test_the_terms_read_where_a_code_is_and_where_it_is_predicted(last_code: bool) -> None:
    torch.manual_seed(0)
    model, robust = Toy(), RobustEmbedding(torch.randn(9, 4), 6, projection_dim=5, weight=0.5)
    robust.attach(model, encode="layers.0", decode="layers.2", prefix=2, last_code=last_code)
    codes, mask = torch.randint(9, (3, 5)), torch.rand(3, 5) < 0.4
    tokens = torch.cat([torch.zeros(3, 2, dtype=torch.int64), codes], dim=1)[:, : 7 if last_code else 6]
    final = model(tokens)
    hidden = model.layers[0](model.embeddings(tokens))[0]
    held = 5 if last_code else 4
    vectors = robust.codebook[codes]
    encode = cosine_to_targets(robust.encode_align_mlp(hidden[:, 2:]), vectors[:, :held])
    decode = cosine_to_targets(robust.decode_align_mlp(final[:, 1:6]), vectors)
    for given in (mask, None):
        model(tokens)
        excluded = given if given is None else given[:, :held]
        wanted = 0.5 * (alignment_loss(encode, excluded) + alignment_loss(decode))
        torch.testing.assert_close(robust.loss(codes, given), wanted)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_needs_the_form_that_keeps_gradients(toy: tuple[Toy, RobustEmbedding]) -> None:
    model, robust = toy
    codes, tokens = torch.zeros(3, 5, dtype=torch.int64), torch.arange(21).view(3, 7) % 9
    results = []
    for model.reentrant in (None, False):
        model.zero_grad()
        robust.zero_grad()
        with set_checkpoint_early_stop(False):
            model(tokens)
        robust.loss(codes).backward()
        with pytest.raises(RuntimeError, match="no projections"):  # the second pass, during backward, is no forward
            robust.loss(codes)
        results.append([parameter.grad for module in toy for parameter in module.parameters()])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)
    model.reentrant = True
    with pytest.raises(RuntimeError, match=r"layers\.0 runs without gradients.* use_reentrant=False"):
        model(tokens)
    with torch.no_grad():  # validation
        model(tokens)
        assert not robust.loss(codes).requires_grad


def test_without_a_forward_pass_in_training_there_is_no_loss(toy: tuple[Toy, RobustEmbedding]) -> None:
    model, robust = toy
    codes, tokens = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    x = model.embeddings(tokens)
    for layer in model.layers:  # as in a second pass of checkpointing: blocks alone are no pass of the model
        x = layer(x)[0]
    with pytest.raises(RuntimeError, match="no projections"):
        robust.loss(codes)
    model(tokens)
    model.eval()
    model(tokens[:, :1])  # as in decoding with a cache
    with pytest.raises(RuntimeError, match="no projections"):
        robust.loss(codes)
    model.train()(tokens)
    robust.detach()
    with pytest.raises(RuntimeError, match="no projections"):
        robust.loss(codes)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    robust.attach(model, "layers.1", "layers.1", prefix=2)
    model(tokens)
    assert robust.loss(codes).isfinite()


def test_a_copy_of_the_model_reads_into_a_copy(toy: tuple[Toy, RobustEmbedding]) -> None:
    """As for a moving average of the weights: its forward passes leave the model's alone."""
    model, robust = toy
    average = copy.deepcopy(model)
    codes, tokens = torch.zeros(3, 5, dtype=torch.int64), torch.arange(21).view(3, 7) % 9
    model(tokens)
    wanted = robust.loss(codes)
    model(tokens)
    average(1 - tokens % 2)
    assert torch.equal(robust.loss(codes), wanted)


def test_wrong_arguments_are_errors(toy: tuple[Toy, RobustEmbedding]) -> None:
    model, robust = toy
    codes, tokens = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="already attached"):
        robust.attach(model, "layers.0", "layers.2", prefix=2)
    robust.detach()
    with pytest.raises(ValueError, match=r"no module 'layer\.0' in Toy; similar names: layers\.0, "):
        robust.attach(model, "layer.0", "layers.2", prefix=2)
    with pytest.raises(ValueError, match="prefix=0: expected at least 1"):
        robust.attach(model, "layers.0", "layers.2", prefix=0)
    robust.attach(model, "layers.0", "layers.2", prefix=1)
    model(tokens)
    with pytest.raises(ValueError, match=r"\(3, 7\), expected \(3, 6\): 1 of prefix \+ 5 codes"):
        robust.loss(codes)
    model(tokens[:, :6])
    with pytest.raises(ValueError, match=r"mask: found \(3, 4\), expected that of the codes, \(3, 5\)"):
        robust.loss(codes, torch.zeros(3, 4, dtype=torch.bool))
    other = RobustEmbedding(torch.randn(9, 4), 8)
    other.attach(model, "layers.0", "layers.2", prefix=1)
    with pytest.raises(ValueError, match=r"layers\.0: its output is \(3, 7, 6\), expected \(B, T, 8\)"):
        model(tokens)
    with pytest.raises(ValueError, match=r"codebook: found torch.int64 \(4,\)"):
        RobustEmbedding(torch.zeros(4, dtype=torch.int64), 8)
    for arguments, message in (
        ((codes, 1000), "progress=1000: expected 0 to 1"),
        ((codes[0], 0.5), r"codes: found torch.int64 \(5,\)"),
        ((codes, 0.5, torch.rand(3, 5)), r"uniforms: found \(3, 5\), expected \(B, 2 N \+ 1\) = \(3, 11\)"),
    ):
        with pytest.raises(ValueError, match=message):
            robust.perturb(*arguments)


def test_the_perturbation_is_annealed_from_the_largest_ratio() -> None:
    robust = RobustEmbedding(torch.randn(9, 4), 6, 5, max_ratio=0.5, perturbation=mask_codes)
    codes, uniforms = torch.zeros(2000, 16, dtype=torch.int64), torch.rand(2000, 33, generator=torch.manual_seed(0))
    for progress, share in ((0.0, 0.25), (ANNEAL_END / 2, 0.125), (ANNEAL_END, 0.0), (1.0, 0.0)):
        perturbed, mask = robust.perturb(codes, progress, uniforms)
        assert torch.equal(perturbed, 9 * mask)
        assert mask.float().mean().item() == pytest.approx(share, abs=0.01)
    torch.manual_seed(0)
    drawn = robust.perturb(codes, 0.0)[1]
    assert torch.equal(drawn, robust.perturb(codes, 0.0, torch.rand(2000, 33, generator=torch.manual_seed(0)))[1])


def test_only_the_projectors_are_trained_and_saved() -> None:
    codebook = torch.randn(9, 4, requires_grad=True)
    robust = RobustEmbedding(codebook, 6, projection_dim=5)
    assert {name.split(".")[0] for name in robust.state_dict()} == {"encode_align_mlp", "decode_align_mlp"}
    assert robust.state_dict().keys() == dict(robust.named_parameters()).keys()
    assert not robust.codebook.requires_grad
    assert robust.codebook.data_ptr() != codebook.data_ptr()
    assert not robust.encode_align_mlp[0].bias.any()
    assert robust.decode_align_mlp[2].weight.abs().max() < 0.1
