"""Turn images into tokenizer codes, once, so that training reads codes instead of images.

    PYTHONPATH=. python scripts/pretokenize.py config=configs/rear_b.yaml \\
        dataset.params.train_shards_path_or_url="imagenet-train-{000000..000252}.tar" \\
        dataset.params.pretokenization=maskgitvq.jsonl

Reads the images of `dataset.params.train_shards_path_or_url` in their order, cuts each into the crops of
`dataset.preprocessing.pretokenize_crops` and encodes them with `experiment.tokenizer_checkpoint`, on a GPU if there
is one: `training.per_gpu_batch_size` crops at a time, read by `dataset.params.num_workers_per_gpu` processes.

Writes `dataset.params.pretokenization`: a .tokens store or, if the name ends in .jsonl, that file and the store beside
it. Both appear when they are complete. Samples are in the order of the images, the crops of an image side by side.
"""

if __name__ == "__main__":  # a typo in the config ends here, before the slow imports
    from utils.config import check_tokenizer_fits, load_config_or_exit

    CONFIG = load_config_or_exit(check_tokenizer_fits)

import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.images import ImageDataset, open_images
from data.token_store import TokenStore, export_jsonl
from data.token_writer import StoreMeta, TokenStoreWriter
from data.transforms import pretokenize_transform
from modeling.maskgit_vq import MaskGitVQ, load_tokenizer
from utils.config import Config
from utils.errors import InputError, input_errors_exit


def main(config: Config) -> None:
    params = config.dataset.params
    for key in ("train_shards_path_or_url", "pretokenization"):
        if getattr(params, key) is None:
            raise InputError(f"dataset.params.{key}: missing; give the images to read and the codes to write")
    output = Path(params.pretokenization)
    if output.suffix not in (".jsonl", ".tokens"):
        raise InputError(f"dataset.params.pretokenization={output}: expected a name that ends in .jsonl or .tokens")
    crop_size, resolution = config.dataset.preprocessing.crop_size, config.model.vq_model.resolution
    if crop_size != resolution:
        raise InputError(
            f"dataset.preprocessing.crop_size={crop_size}: expected model.vq_model.resolution={resolution}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.training.enable_tf32
    tokenizer = load_tokenizer(config).to(device)
    source = open_images(params.train_shards_path_or_url, config.model.generator.condition_num_classes)
    images = ImageDataset(source, pretokenize_transform(config.dataset.preprocessing), config.training.seed)

    started = time.perf_counter()
    num_samples = encode_images(images, tokenizer, device, output.with_suffix(".tokens"), config)
    images_per_second = len(images) / (time.perf_counter() - started)
    if output.suffix == ".jsonl":
        export_jsonl(TokenStore(output.with_suffix(".tokens")), output)
    print(f"{output}: {len(images)} images, {num_samples} samples, {images_per_second:.1f} images/s on {device}")


def encode_images(
    images: ImageDataset, tokenizer: MaskGitVQ, device: torch.device, store_path: Path, config: Config
) -> int:
    """Write the codes of all crops to a token store; return how many samples it holds."""
    crops = images[0]["image"].shape[0]
    loader = DataLoader(
        images,
        batch_size=max(1, config.training.per_gpu_batch_size // crops),
        num_workers=config.dataset.params.num_workers_per_gpu,
        collate_fn=images.collate,
    )
    meta = StoreMeta(
        image_seq_len=tokenizer.image_seq_len,
        codebook_size=tokenizer.codebook_size,
        crops_per_image=crops,
        class_names=images.source.class_names,
    )
    with TokenStoreWriter(store_path, meta) as writer, tqdm(total=len(images), unit="image") as progress:
        for batch in loader:
            with torch.inference_mode():
                codes = tokenizer.encode(batch["image"].flatten(0, 1).to(device))  # (B, K, 3, H, W) -> (B * K, N)
            writer.append(codes.cpu().numpy(), batch["class_labels"].repeat_interleave(crops).numpy())
            progress.update(len(batch["image"]))
    return len(images) * crops


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
