"""Compare npz files of images with a reference: the five numbers of the ADM evaluator, without TensorFlow, and KID.

    python evaluation/evaluator.py REF.npz SAMPLES.npz --inception pt_inception-2015-12-05-6726825d.pth
    torchrun --nproc_per_node=8 evaluation/evaluator.py REF.npz SAMPLES.npz
    python evaluation/evaluator.py REF.npz SAMPLES.npz --backend timm:vit_large_patch14_dinov2.lvd142m
    python evaluation/evaluator.py REF.npz SAMPLES.npz SAMPLES_2.npz --backend efficientnet_lite0
    python evaluation/evaluator.py --compare A.npz B.npz REF.npz

Images are arr_0, uint8 NHWC; REF.npz may hold stored statistics. Prints inception_score, fid, sfid, precision and
recall as evaluations/evaluator.py of https://github.com/openai/guided-diffusion does, then KID. The numbers do not
depend on the number of processes.

Other back ends give the Frechet and the kernel distance of the features of an encoder, which are not FID and KID:
timm:NAME[:FILE], any model of timm, with its weights on the Hub or in FILE; efficientnet_lite0, of a Python package.

Writes <SAMPLES>.<backend>.json next to the samples: numbers, N, hashes of the files and of the weights, versions. With
a second reference for the same samples it is <SAMPLES>.<REF>.<backend>.json. Existing numbers of the same files,
weights, device, code and versions are not computed again. The features of the reference are kept in
<REF>.<backend>.features.safetensors. `--log-to RUN` also appends the numbers to the metrics of the training run, at the
step of the sampled weights.

--compare prints the difference of the Frechet distances of two files with equally many samples, and its bootstrap
interval over the images, which says nothing about retraining. It writes <A>.compared_with_<B>.<backend>.json.
"""

import argparse
import sys
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import torch

from evaluation.collect import FeatureSums, collect
from evaluation.comparison import SCOPE, compare
from evaluation.features import EncoderFeatures, Extractor
from evaluation.inception import Inception
from evaluation.inputs import Npz, check_statistics, open_input
from evaluation.kept_features import is_kept, keep, read_kept
from evaluation.kernel_distance import kernel_distance
from evaluation.metrics import Gaussian, frechet_distance
from evaluation.precision_recall import FEATURE_DTYPES, precision_recall
from evaluation.report import (
    USUAL_DISTANCE,
    feature_provenance,
    file_label,
    find_same,
    names_in_log,
    new_report,
    print_comparison,
    print_files,
    print_metrics,
    write_comparison,
    write_report,
)
from evaluation.run_log import find_step, log_scores
from modeling.encoders.registry import EXPECTED, is_encoder_name
from utils.arguments import positive
from utils.distributed import DistributedContext, init_distributed
from utils.errors import InputError, input_errors_exit
from utils.files.text import user_path


class Evaluator:
    """Compares files of samples with one reference, whose features are computed once. All processes of `ctx` create it
    and call it.

    Args:
        backend: inception, efficientnet_lite0 or timm:NAME[:FILE].
        inception: weights file; None: from torch hub's cache.
        distance: for precision and recall: tf-fp16 (as the original) or fp32 (exact).
        batch_size: images per process and batch.
        device: computes the features; None: the device of `ctx`.

    Raises:
        InputError: wrong reference or weights, or arguments that exclude each other.
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
        self.ctx = ctx
        self.batch_size = batch_size
        self.device = device or ctx.device
        self.settings = {"backend": ":".join(backend.split(":")[:2]), "device": self.device.type}  # without FILE
        if backend == "inception":
            self.settings["distance"] = distance
        self.extractor = ctx.rank0_first(lambda: load_extractor(backend, inception, self.device))
        self.reference = self.open(reference)

    def __call__(self, samples: Npz) -> dict[str, Any]:
        """The report of opened samples, or an existing one with the same provenance. Prints the compared files."""
        report = new_report(self.reference, samples, self.extractor, self.settings)
        if self.ctx.is_rank0:
            print_files(report)
        if done := self.ctx.broadcast_from_rank0(find_same, samples.images.path, report):
            return done
        sums = self._collect(samples, "samples")
        assert sums.features is not None
        assert self.reference_sums.features is not None
        of_features = self.ctx.broadcast_from_rank0(kernel_distance, self.reference_sums.features, sums.features)
        if self.settings["backend"] == "inception":
            report["metrics"] = self._adm_metrics(samples, sums)
            report["metrics"] |= {"kid": of_features.mean, "kid_std": of_features.std}
        else:
            report["metrics"] = {
                "frechet_distance": frechet_distance(self.reference_gaussian, sums.pool.gaussian()),
                "kernel_distance": of_features.mean,
                "kernel_distance_std": of_features.std,
            }
        return report

    def compare(self, a: Npz, b: Npz) -> dict[str, Any]:
        """The report of the difference of two opened files. Raises InputError for different numbers of samples."""
        counts = [len(npz.images) for npz in (a, b)]
        if counts[0] != counts[1]:
            raise InputError(
                f"{b.images.path}: found {counts[1]} samples, expected {counts[0]} as in {a.images.path}: Frechet "
                "distances are comparable at equal N only"
            )
        reports, features = {}, {}
        for name, npz in (("a", a), ("b", b)):
            reports[name] = new_report(self.reference, npz, self.extractor, self.settings)
            collected = self._collect(npz, title=name.upper()).features
            assert collected is not None
            features[name] = collected.to(self.device)
        difference = compare(self.reference_gaussian, features_a=features["a"], features_b=features["b"], ctx=self.ctx)
        provenance = reports["a"]["provenance"]
        samples = {name: report["provenance"].pop("samples") for name, report in reports.items()}
        return {
            "provenance": provenance | samples,
            "warnings": list(dict.fromkeys(reports["a"]["warnings"] + reports["b"]["warnings"])),
            "metrics": asdict(difference),
            "scope": SCOPE,
        }

    def _adm_metrics(self, samples: Npz, sums: FeatureSums) -> dict[str, float]:
        """The five numbers. All processes call it."""
        assert sums.score is not None
        assert sums.features is not None
        assert self.reference_sums.features is not None
        dtype = FEATURE_DTYPES[self.settings["distance"]]
        precision, recall = precision_recall(
            reference=self.reference_sums.features.to(self.device, dtype),
            samples=sums.features.to(self.device, dtype),
            ctx=self.ctx,
        )
        of_reference = gaussians(self.reference, self.reference_sums)
        of_samples = gaussians(samples, sums)
        return {
            "inception_score": sums.score.inception_score(),
            "fid": frechet_distance(self.reference_gaussian, of_samples["pool"]),
            "sfid": frechet_distance(of_reference["spatial"], of_samples["spatial"]),
            "precision": precision,
            "recall": recall,
        }

    @cached_property
    def reference_sums(self) -> FeatureSums:
        """Features and moments of the reference, computed once and kept in a file."""
        provenance = feature_provenance(self.reference, self.extractor, self.settings)
        path = self.reference.images.path.with_suffix(f".{file_label(provenance)}.features.safetensors")
        if self.ctx.broadcast_from_rank0(is_kept, path, provenance):
            sums = FeatureSums(len(self.reference.images), self.extractor, torch.float32, self.device)
            self.ctx.rank0_first(read_kept, path, sums, self.device)
            return sums
        sums = self._collect(self.reference, "reference")
        if self.ctx.is_rank0:
            keep(path, sums, provenance)
        return sums

    def open(self, path: Path) -> Npz:
        """Raises InputError for anything but an npz of images, and for statistics of other Inception weights."""
        npz = self.ctx.rank0_first(lambda: open_input(path, verify=self.ctx.is_rank0))
        if self.settings["backend"] == "inception":
            check_statistics(npz, self.extractor.weights_sha256)
        return npz

    @property
    def reference_gaussian(self) -> Gaussian:
        """Mean and covariance of the reference's pool features."""
        if self.settings["backend"] == "inception":
            return gaussians(self.reference, self.reference_sums)["pool"]
        return self.reference_sums.pool.gaussian()

    def _collect(self, npz: Npz, title: str) -> FeatureSums:
        return collect(
            npz.images,
            self.extractor,
            self.ctx,
            batch_size=self.batch_size,
            title=title,
            device=self.device,
            keep_as=torch.float32,
        )


def load_extractor(backend: str, inception: Path | None, device: torch.device) -> Extractor:
    """The back end of that name; raises InputError for missing or wrong weights."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: no GPU is available, expected cpu")
    if backend == "inception":
        return Inception(device, inception)
    if inception is not None:
        raise InputError(f"--inception {inception}: not used by --backend {backend}")
    return EncoderFeatures(backend, device)


def backend_name(text: str) -> str:
    """The argument of --backend, for argparse."""
    if text != "inception" and not is_encoder_name(text):
        raise argparse.ArgumentTypeError(f"{text!r}: {EXPECTED}, or inception")
    return text


def gaussians(npz: Npz, sums: FeatureSums) -> dict[str, Gaussian]:
    """Mean and covariance of both kinds of features; statistics stored in the file replace computed ones."""
    if npz.statistics is not None:
        mu, sigma, mu_s, sigma_s = (npz.statistics[key] for key in ("mu", "sigma", "mu_s", "sigma_s"))
        return {"pool": Gaussian(mu, sigma), "spatial": Gaussian(mu_s, sigma_s)}
    assert sums.spatial is not None
    return {"pool": sums.pool.gaussian(), "spatial": sums.spatial.gaussian()}


def add_feature_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that computes features."""
    parser.add_argument("--inception", type=user_path, help="Inception weights; by default those in torch hub's cache")
    parser.add_argument("--batch-size", type=positive, default=64, help="images per process and batch")
    parser.add_argument("--device", type=torch.device, choices=[torch.device("cpu"), torch.device("cuda")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=user_path, nargs="?", help="npz of reference images")
    parser.add_argument(
        "samples", type=user_path, nargs="*", help="npz of generated images; several share the reference"
    )
    parser.add_argument(
        "--compare",
        type=user_path,
        nargs=3,
        metavar=("A", "B", "REF"),
        help="the difference of two npz of generated images",
    )
    parser.add_argument(
        "--backend", type=backend_name, default="inception", help="inception, efficientnet_lite0 or timm:NAME[:FILE]"
    )
    parser.add_argument(
        "--distance", choices=tuple(FEATURE_DTYPES), default=USUAL_DISTANCE, help="of precision and recall"
    )
    parser.add_argument(
        "--log-to", type=user_path, metavar="RUN", help="run folder whose metrics.jsonl gets the numbers"
    )
    add_feature_options(parser)
    args = parser.parse_intermixed_args()
    if args.compare and (args.reference or args.log_to):
        parser.error("--compare A B REF: expected no other files, and no --log-to")
    if not args.compare and not args.samples:
        parser.error("expected REF.npz and SAMPLES.npz, or --compare A.npz B.npz REF.npz")
    with init_distributed() as ctx:
        steps: dict[Path, int] = {}
        if args.log_to:
            steps = ctx.broadcast_from_rank0(lambda: {path: find_step(path, args.log_to) for path in args.samples})
        evaluator = Evaluator(
            args.compare[2] if args.compare else args.reference,
            ctx,
            backend=args.backend,
            inception=args.inception,
            distance=args.distance,
            batch_size=args.batch_size,
            device=args.device,
        )
        if args.compare:
            a, b = (evaluator.open(path) for path in args.compare[:2])
            report = evaluator.compare(a, b)
            if ctx.is_rank0:
                print_comparison(report)
                print(f"report: {write_comparison(report, *args.compare[:2])}", file=sys.stderr)
            return
        opened = [evaluator.open(path) for path in args.samples]  # errors in any file come before the work
        for path, npz in zip(args.samples, opened, strict=True):
            report = evaluator(npz)
            if ctx.is_rank0:
                print_metrics(report)
                print(f"report: {write_report(report, path)}", file=sys.stderr)
                if args.log_to:
                    log_scores(args.log_to, steps[path], names_in_log(report))
                    print(f"appended to the metrics of {args.log_to} at step {steps[path]}", file=sys.stderr)


if __name__ == "__main__":
    with input_errors_exit():
        main()
