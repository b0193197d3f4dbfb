import torch

from modeling.losses import alignment_loss, cosine_to_codes, next_token_loss
from modeling.noise import switch_codes
from modeling.rear import ReAR, ReAROutput
from modeling.tokenizers.registry import load_tokenizer
from modeling.training_step import num_uniforms, training_step
from utils.config import load_config


def test_a_training_step_noises_the_context_and_keeps_targets_and_embeddings_clean(tiny_arguments: list[str]) -> None:
    config = load_config([*tiny_arguments, "experiment.output_dir=unused", "model.generator.class_label_dropout=0.5"])
    tokenizer = load_tokenizer(config)
    generator = torch.Generator().manual_seed(0)
    codes, labels = torch.randint(24, (6, 16), generator=generator), torch.arange(6) % 5
    logits, z = torch.randn(6, 16, 24, generator=generator), torch.randn(6, 16, 8, generator=generator)
    uniforms = torch.rand(6, 34, generator=generator)
    fed = []

    def model(context: torch.Tensor, class_labels: torch.Tensor, orders: None) -> ReAROutput:
        fed.extend([context, class_labels])
        return ReAROutput(logits, z, -z)

    terms = training_step(model, tokenizer, {"codes": codes, "class_labels": labels, "uniforms": uniforms}, 0.9, config)
    context, mask = switch_codes(codes, uniforms[:, 1:], 0.9, 24)
    assert torch.equal(fed[0], context)
    assert 0.1 < (context != codes).float().mean() < 0.9
    assert torch.equal(fed[1], torch.where(uniforms[:, 0] < 0.5, 5, labels))
    assert torch.equal(terms.metrics["train/ar_loss"], next_token_loss(logits, codes))
    vectors = tokenizer.embed(codes)
    cosines = [cosine_to_codes(vector, vectors) for vector in (z, -z)]
    assert torch.equal(terms.metrics["train/proj_loss"], alignment_loss(cosines[0], mask) + alignment_loss(cosines[1]))


def test_images_train_as_their_codes_do(tiny_arguments: list[str]) -> None:
    config = load_config([*tiny_arguments, "experiment.output_dir=unused"])
    tokenizer, model = load_tokenizer(config), ReAR(config.model).eval()
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    labels_and_uniforms = {"class_labels": labels, "uniforms": torch.rand(4, num_uniforms(16))}
    of_images, of_codes = (
        training_step(model, tokenizer, batch | labels_and_uniforms, 0.5, config)
        for batch in ({"image": images}, {"codes": tokenizer.encode(images)})
    )
    assert len(tokenizer.encode(images).unique()) > 1
    assert torch.equal(of_images.loss, of_codes.loss)
