"""Compare npz files of images with a reference: the five numbers of the ADM evaluator, without TensorFlow.

    python evaluation/evaluator.py REF.npz SAMPLES.npz --inception pt_inception-2015-12-05-6726825d.pth
    torchrun --nproc_per_node=8 evaluation/evaluator.py REF.npz SAMPLES.npz
    python evaluation/evaluator.py REF.npz SAMPLES.npz SAMPLES_2.npz --backend efficientnet_lite0

REF.npz may hold stored statistics; images are arr_0, uint8 NHWC. Prints inception_score, fid, sfid, precision and
recall as evaluations/evaluator.py of https://github.com/openai/guided-diffusion does; any number of processes and any
batch size give the same. Without Inception weights, efficientnet_lite0 gives a Frechet distance on features that a
package ships: it is no FID, and comparable at equal N only.

Writes <SAMPLES>.<backend>.json beside the samples: the numbers, N, hashes of the files and of the weights, versions. A
second reference for the same samples gets a report of its own, <SAMPLES>.<REF>.<backend>.json. What a report tells of
the same files, weights, device, code and versions is not computed again. `--log-to RUN` writes the numbers to the
metrics of the training run too, at the step of the weights that were sampled.
"""

import argparse
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import numpy as np
import torch

from evaluation.collect import Collected, collect
from evaluation.features import EfficientNetLite0, Extractor
from evaluation.inception import Inception
from evaluation.inputs import check_statistics, open_input
from evaluation.metrics import frechet_distance
from evaluation.precision_recall import FEATURE_DTYPES, precision_recall
from evaluation.report import (
    USUAL_DISTANCE,
    find_same,
    new_report,
    print_files,
    print_metrics,
    write_report,
)
from evaluation.run_log import find_step, log_scores
from utils.distributed import DistributedContext, init_distributed
from utils.errors import InputError, input_errors_exit
from utils.files.npz import Npz

BACKENDS = ("inception", "efficientnet_lite0")


class Evaluator:
    """Compares files of samples with one reference, whose features are computed once. All processes of `ctx` make it
    and call it.

    Args:
        backend: inception or efficientnet_lite0.
        inception: weights file; None: from the cache of the libraries.
        distance: of precision and recall: tf-fp16 (as the original) or fp32 (exact).
        batch_size: images per process and batch.
        device: of the features; None: that of `ctx`.

    Raises:
        InputError: the reference or the weights are not as expected, or arguments that do not go together.
    """

    def __init__(
        self,
        reference: Path,
        ctx: DistributedContext,
        backend: str = "inception",
        inception: Path | None = None,
        distance: str = USUAL_DISTANCE,
        batch_size: int = 64,
        device: torch.device | None = None,
    ) -> None:
        if backend != "inception" and distance != USUAL_DISTANCE:
            raise InputError(f"--distance {distance}: not used by --backend {backend}")
        self.ctx, self.batch_size, self.device = ctx, batch_size, device or ctx.device
        self.extractor = ctx.rank0_first(lambda: load_extractor(backend, inception, self.device))
        self.reference = self.open(reference)
        self.settings = {"backend": backend, "device": self.device.type}
        self.settings |= {"distance": distance} if backend == "inception" else {}
        self.keep_as = FEATURE_DTYPES[distance] if backend == "inception" else None

    def __call__(self, samples: Npz) -> dict[str, Any]:
        """The report of opened samples: `metrics` by name, `warnings` and `provenance`; if there is already one with
        this provenance, that one. Prints the files that are compared.
        """
        backend = self.settings["backend"]
        report = new_report(self.reference, samples, self.extractor, self.settings)
        if self.ctx.is_rank0:
            print_files(report)
        if done := self.ctx.broadcast_from_rank0(find_same, samples.images.path, report):
            return done
        sides = [self.of_reference, self._collect(samples, "samples")]
        if backend == "inception":
            report["metrics"] = adm_metrics([self.reference, samples], sides, self.ctx, self.device)
        else:
            moments = (side.pool.mean_and_covariance() for side in sides)
            report["metrics"] = {"frechet_distance": frechet_distance(*next(moments), *next(moments))}
        return report

    @cached_property
    def of_reference(self) -> Collected:
        return self._collect(self.reference, "reference")

    def open(self, path: Path) -> Npz:
        """
        Raises:
            InputError: a file that is not as expected.
        """
        npz = self.ctx.rank0_first(lambda: open_input(path, verify=self.ctx.is_rank0))
        check_statistics(npz, self.extractor.weights_sha256)
        return npz

    def _collect(self, npz: Npz, title: str) -> Collected:
        return collect(npz.images, self.extractor, self.ctx, self.device, self.batch_size, title, self.keep_as)


def load_extractor(backend: str, inception: Path | None, device: torch.device) -> Extractor:
    """The back end of that name; raises InputError for weights that are missing or wrong."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: no GPU is available, expected cpu")
    if backend == "inception":
        return Inception(device, inception)
    if inception is not None:
        raise InputError(f"--inception {inception}: not used by --backend {backend}")
    return EfficientNetLite0(device)


def adm_metrics(
    opened: list[Npz], sides: list[Collected], ctx: DistributedContext, device: torch.device
) -> dict[str, float]:
    """The five numbers; `opened` and `sides` are those of the reference and of the samples."""
    features, score = [side.features.to(device) for side in sides if side.features is not None], sides[1].score
    assert score is not None, "collected with Inception"
    precision, recall = precision_recall(features[0], features[1], ctx)
    reference, samples = (gaussians(npz, side) for npz, side in zip(opened, sides, strict=True))
    return {
        "inception_score": score.inception_score(),
        "fid": frechet_distance(*reference["pool"], *samples["pool"]),
        "sfid": frechet_distance(*reference["spatial"], *samples["spatial"]),
        "precision": precision,
        "recall": recall,
    }


def gaussians(npz: Npz, side: Collected) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and covariance of both kinds of features: the stored ones if the file has them."""
    if npz.statistics is not None:
        mu, sigma, mu_s, sigma_s = npz.statistics.values()
        return {"pool": (mu, sigma), "spatial": (mu_s, sigma_s)}
    assert side.spatial is not None, "collected with Inception"
    return {"pool": side.pool.mean_and_covariance(), "spatial": side.spatial.mean_and_covariance()}


def positive(text: str) -> int:
    """For argparse: a whole number from 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


def add_feature_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that computes features."""
    parser.add_argument("--inception", type=Path, help="Inception weights; by default those in torch hub's cache")
    parser.add_argument("--batch-size", type=positive, default=64, help="images per process and batch")
    parser.add_argument("--device", type=torch.device, choices=[torch.device("cpu"), torch.device("cuda")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, help="npz of reference images")
    parser.add_argument("samples", type=Path, nargs="+", help="npz of generated images; several share the reference")
    parser.add_argument("--backend", choices=BACKENDS, default="inception")
    parser.add_argument(
        "--distance", choices=tuple(FEATURE_DTYPES), default=USUAL_DISTANCE, help="of precision and recall"
    )
    parser.add_argument("--log-to", type=Path, metavar="RUN", help="run folder whose metrics.jsonl gets the numbers")
    add_feature_options(parser)
    args = vars(parser.parse_args())
    run, samples = args.pop("log_to"), args.pop("samples")
    with init_distributed() as ctx:
        steps = ctx.broadcast_from_rank0(lambda: [find_step(path, run) for path in samples]) if run else []
        evaluator = Evaluator(ctx=ctx, **args)
        opened = [evaluator.open(path) for path in samples]  # what is wrong with any is told before the work begins
        for number, (path, npz) in enumerate(zip(samples, opened, strict=True)):
            report = evaluator(npz)
            if ctx.is_rank0:
                print_metrics(report)
                print(f"report: {write_report(report, path)}", file=sys.stderr)
                if run:
                    log_scores(run, steps[number], report["metrics"])
                    print(f"in the metrics of {run} at step {steps[number]}", file=sys.stderr)


if __name__ == "__main__":
    with input_errors_exit():
        main()
