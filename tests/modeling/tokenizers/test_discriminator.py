import pytest
import torch

from modeling.tokenizers.discriminator import FeatureDiscriminator, discriminator_loss, generator_loss


def maps_of(seed: int, shift: float) -> list[torch.Tensor]:
    """Unit-length maps of two sizes and widths, around another direction for another shift."""
    random = torch.Generator().manual_seed(seed)
    maps = [torch.randn(4, channels, size, size, generator=random) for channels, size in ((8, 6), (5, 3))]
    for x in maps:
        x[:, 0] += shift
    return [torch.nn.functional.normalize(x, dim=1) for x in maps]


def test_heads_learn_to_distinguish_images_from_reconstructions() -> None:
    torch.manual_seed(0)
    discriminator = FeatureDiscriminator([8, 5])
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        judged = discriminator(maps_of(step, 1.0)), discriminator(maps_of(step, -1.0))
        loss = discriminator_loss(*judged)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.3)
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        image, reconstruction = discriminator(maps_of(99, 1.0)), discriminator(maps_of(99, -1.0))
    assert [x.shape for x in image] == [(4, 1, 6, 6), (4, 1, 3, 3)]
    assert generator_loss(image) < 0 < generator_loss(reconstruction)


def test_hinge_loss() -> None:
    far, near = [torch.full((1, 1, 2, 2), 3.0)], [torch.full((1, 1, 2, 2), 0.25)]
    assert discriminator_loss(far, [-x for x in far]) == 0
    assert discriminator_loss(near, near).item() == pytest.approx((0.75 + 1.25) / 2)
    assert generator_loss([*far, *near]).item() == pytest.approx(-(3 + 0.25) / 2)
