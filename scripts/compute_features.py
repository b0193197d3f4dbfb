"""Compute the features of a frozen encoder once, for taps with `target: stored`.

    python scripts/compute_features.py efficientnet_lite0 outputs/features.npy config=configs/rear_blue_marble.yaml

ENCODER is a source of `target: encoder` (docs/alignment.md). The samples are the stored tokens of the config with their
images, `dataset.params.pretokenization` and `train_shards_path_or_url`, in their order. KEY=VALUE overrides the config.
This saves time if the same images are seen many times, as in the runs of a study on little data.

Writes OUTPUT atomically, float16 (n, N, Z), and OUTPUT.json, its provenance. If OUTPUT exists for the same
data and encoder, nothing is computed.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import numpy as np
import torch
from tqdm import tqdm

from data.loading import Batches, on_device
from data.training_batches import open_training_data
from modeling.encoders.registry import open_encoder
from modeling.loading import load_tokenizer
from utils.config import load_config
from utils.errors import InputError, input_errors_exit
from utils.files.atomic import atomic_file
from utils.files.provenance import is_made, write_record
from utils.files.text import user_path
from utils.run.run_environment import code_facts


def main(encoder_name: str, output: Path, overrides: list[str]) -> None:
    config = load_config(["experiment.output_dir=unused", *overrides])
    if config.dataset.params.pretokenization is None:
        raise InputError("dataset.params.pretokenization: missing; random crops of images have no stored features")
    if output.suffix != ".npy":
        raise InputError(f"{output}: expected a name that ends in .npy")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(config)
    if len(tokenizer.code_shape) != 2 or tokenizer.code_shape[0] != tokenizer.code_shape[1]:
        raise InputError(f"{encoder_name}: found tokens of shape {tokenizer.code_shape}, expected a square grid")
    data = open_training_data(config, tokenizer.sha256(), verify=True, need_images=[encoder_name])
    encoder = open_encoder(encoder_name, grid_size=tokenizer.code_shape[0]).to(device)
    provenance = {
        "data": data.fingerprint,
        "encoder": encoder.name,
        "sha256 of the encoder": encoder.weights_sha256,
        "device": device.type,
    }
    shape = (len(data), tokenizer.image_seq_len, encoder.patch_dim)
    if is_made(output, provenance):
        print(f"{output}: already computed")
        return
    size = config.training.per_gpu_batch_size
    items = [list(range(start, min(start + size, len(data)))) for start in range(0, len(data), size)]
    with atomic_file(output) as partial:
        rows = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        for batch in tqdm(Batches(data, items, config.dataset.params.num_workers_per_gpu), output.name, len(items)):
            images = on_device(batch, device)["image"]
            rows[batch["index"].numpy()] = encoder.patch_features(images).half().cpu().numpy()
        rows.flush()
    write_record(output, provenance, figures={"bytes": output.stat().st_size, "shape": shape, **code_facts()})
    print(f"{output}: {shape}, features of {encoder}; z_dim: {encoder.patch_dim}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", metavar="ENCODER", help="efficientnet_lite0 or timm:NAME[:FILE]")
    parser.add_argument("output", metavar="OUTPUT", type=user_path, help="the .npy to write")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="config=FILE.yaml, then overrides of keys")
    options = parser.parse_args()
    with input_errors_exit():
        main(options.encoder, options.output, options.overrides)
