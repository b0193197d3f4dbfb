from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from modeling.loading import load_tokenizer
from modeling.losses import next_token_loss
from modeling.perturbation import num_perturbation_uniforms, switch_codes
from modeling.rear import ReAR, ReAROutput
from modeling.robust_embedding import alignment_loss, cosine_to_targets
from modeling.targets.registry import Targets
from modeling.training_step import compile_blocks, training_step
from utils.config import load_config


def test_a_training_step_perturbs_the_context_and_keeps_targets_and_embeddings_clean(tiny_arguments: list[str]) -> None:
    config = load_config([*tiny_arguments, "experiment.output_dir=unused"])
    tokenizer = load_tokenizer(config)
    generator = torch.Generator().manual_seed(0)
    codes, labels = torch.randint(24, (6, 16), generator=generator), torch.tensor([2, 4])
    logits, z = torch.randn(6, 16, 24, generator=generator), torch.randn(6, 16, 8, generator=generator)
    batch = {"codes": codes, "class_labels": labels, "class_rows": torch.tensor([0, 1, 1, 0, 1, 0])}
    batch["perturbation_uniforms"] = torch.rand(6, 33, generator=generator)
    fed = []

    def model(
        context: torch.Tensor, class_labels: torch.Tensor, orders: None, class_rows: torch.Tensor, target_codes: Any
    ) -> ReAROutput:
        fed.extend([context, class_labels, class_rows])
        return ReAROutput(logits, {"encode": z, "decode": -z})

    terms = training_step(model, tokenizer, batch, 0.9, config, Targets(config, tokenizer))
    context, mask = switch_codes(codes, batch["perturbation_uniforms"], 0.9, 24)
    assert torch.equal(fed[0], context)
    assert 0.1 < (context != codes).float().mean() < 0.9
    assert fed[1:] == [batch["class_labels"], batch["class_rows"]]
    assert torch.equal(terms.metrics["train/ar_loss"], next_token_loss(logits, codes))
    vectors = tokenizer.codebook_lookup(codes)
    cosines = [cosine_to_targets(vector, vectors) for vector in (z, -z)]
    assert torch.equal(terms.metrics["train/proj_loss"], alignment_loss(cosines[0], mask) + alignment_loss(cosines[1]))


def test_images_train_as_their_codes_do(tiny_arguments: list[str]) -> None:
    config = load_config([*tiny_arguments, "experiment.output_dir=unused"])
    tokenizer, model = load_tokenizer(config), ReAR(config.model).eval()
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    others = {
        "class_labels": labels,
        "class_rows": labels,
        "perturbation_uniforms": torch.rand(4, num_perturbation_uniforms(16)),
    }
    of_images, of_codes = (
        training_step(model, tokenizer, batch | others, 0.5, config, Targets(config, tokenizer))
        for batch in ({"image": images}, {"codes": tokenizer.encode(images)})
    )
    assert len(tokenizer.encode(images).unique()) > 1
    assert torch.equal(of_images.loss, of_codes.loss)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(tiny_arguments: list[str]) -> None:
    """Without dropout, whose masks differ; for another number of labels too."""
    overrides = ["model.generator.dropout=0", "model.generator.attn_drop=0", "training.mixed_precision=no"]
    arguments = [*tiny_arguments, "experiment.output_dir=unused", "training.per_gpu_batch_size=6", *overrides]
    config = load_config([*arguments, "training.compile=on"])
    torch.manual_seed(0)
    tokenizer, model = load_tokenizer(config), ReAR(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    results = []
    for compiled in (False, True):
        if compiled:
            assert compile_blocks(model, config, torch.device("cpu")) == []
        for rows in ([0, 1, 1, 0, 1, 0], [0, 1, 2, 3, 1, 0]):
            codes, rows = torch.arange(96).view(6, 16) % 24, torch.tensor(rows)
            batch = {"codes": codes, "class_labels": torch.arange(len(rows.unique())), "class_rows": rows}
            batch["perturbation_uniforms"] = torch.rand(6, 33, generator=torch.Generator().manual_seed(0))
            training_step(model, tokenizer, batch, 0.5, config, Targets(config, tokenizer)).loss.backward()
            results.append([parameter.grad.clone() for parameter in model.parameters()])
            model.zero_grad()
    for eager, compiled in zip(results[:2], results[2:], strict=True):
        for gradients in zip(eager, compiled, strict=True):
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_blocks_are_compiled_once_for_any_number_of_labels(
    tiny_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the generation of code, which needs a compiler. A step has as many labels as happen to be in it; at its
    limit of eight torch would leave the blocks uncompiled."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    arguments = [*tiny_arguments, "experiment.output_dir=unused", "training.per_gpu_batch_size=12"]
    config = load_config([*arguments, "training.compile=on"])
    model = ReAR(config.model)
    assert compile_blocks(model, config, torch.device("cpu")) == []
    compiled = counter.frame_count
    for labels in (4, 2, 5, 12, 9, 3, 11, 6, 7, 8, 10):
        codes, class_labels = torch.zeros(12, 16, dtype=torch.int64), torch.arange(labels) % 5
        model(codes, class_labels, None, torch.arange(12) % labels).logits.sum().backward()
    assert counter.frame_count == compiled == 2


def test_without_a_compiler_the_blocks_run_as_they_are(
    tiny_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*arguments: object, **options: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nMore.")

    monkeypatch.setattr(torch, "compile", no_compiler)
    config = load_config([*tiny_arguments, "experiment.output_dir=unused", "training.compile=on"])
    model = ReAR(config.model)
    with pytest.raises(RuntimeError, match="C compiler"):
        compile_blocks(model, config, torch.device("cpu"))
    config.training.compile = "auto"
    assert compile_blocks(model, config, torch.device("cpu")) == []  # not tried
    (notice,) = compile_blocks(model, config, torch.device("cuda"))
    assert notice.endswith("the blocks run uncompiled, since compiling them failed: Failed to find C compiler.")
    rows = torch.tensor([1, 0, 1])
    model.blocks[0](torch.zeros(3, 18, 32), torch.zeros(2, 18, 32), rows)  # no half of a compiler left
