"""Measure exposure bias exactly: a trained model, the teacher, defines the data distribution that students learn.

    python scripts/exposure_bias.py sample outputs/fashion/ar outputs/exposure_bias/train.tokens --n 60000
    python scripts/exposure_bias.py measure outputs/fashion/ar outputs/studies/exposure_bias/*/seed*/run \\
        --output outputs/exposure_bias

`sample` writes sequences of the teacher (temperature 1, no guidance, class i mod C) as a token store, on which
scripts/train_rear.py trains students. If there are as many sequences as a student sees, none is seen twice and
over-fitting is impossible; the entropy of the data is known. `measure` draws new samples from TEACHER p and each
STUDENT q and computes, in nats per sequence and exact in each next token: forward KL(p || q) on contexts of p, reverse
KL(q || p) on contexts of q, and the excess error: KL(p || q) on contexts of q minus KL(p || q) on contexts of p,
accumulated over positions (https://arxiv.org/abs/2204.01171). Models are run folders, checkpoints or weights files of
a run.

`sample` writes OUTPUT.tokens and its provenance, OUTPUT.json. `measure` writes exposure_bias.json (all numbers, with
95 % intervals over sequences), exposure_bias.md (tables; arms of a study are compared by seed) and exposure_bias.png.
Rerun the same command to resume after a kill, or to add students.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.codes.conversion import edge_of_square
from data.codes.store_files import StoreMeta, check_codebook_size
from data.codes.token_writer import new_token_store
from evaluation.exposure_bias import draw, interval, report, summarize
from modeling.divergence import divergences, entropies
from modeling.loading import load_generator
from modeling.rear import ReAR
from modeling.sampling.image_sampler import class_labels_of
from modeling.sampling.model_samples import ModelSamples
from utils.arguments import natural, positive
from utils.errors import InputError, input_errors_exit
from utils.files.atomic import write_text
from utils.files.json_file import read_json
from utils.files.lock import only_writer
from utils.files.provenance import is_made, write_record
from utils.files.sample_chunks import SampleChunks
from utils.files.text import user_path
from utils.files.weights import weights_sha256
from utils.randomness import Stream
from utils.run.run_config import load_run_config, names_of_runs
from utils.run.weights_path import TrainedWeights, as_trained, find_weights

SEQUENCES_AT_ONCE = 250
SAMPLES_PER_CHUNK = 1000
RESULT_FILE, TABLE_FILE, FIGURE_FILE = "exposure_bias.json", "exposure_bias.md", "exposure_bias.png"


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    if options.command == "sample":
        with only_writer(options.output):
            sample(options.teacher, options.output, count=options.n, seed=options.seed)
    else:
        with only_writer(options.output, inside=True):
            measure(options.teacher, options.students, options.output, count=options.n, seed=options.seed)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sampling = commands.add_parser("sample", help="write a token store of the teacher's sequences")
    sampling.add_argument("teacher", metavar="TEACHER", type=os.path.expanduser, help="the model that is the data")
    sampling.add_argument("output", metavar="OUTPUT.tokens", type=user_path, help="the token store to write")
    sampling.add_argument("--n", type=positive, required=True, help="number of sequences")
    sampling.add_argument("--seed", type=natural, default=1, help="of the samples (default: %(default)s)")
    measuring = commands.add_parser("measure", help="compute the divergences of students from the teacher")
    measuring.add_argument("teacher", metavar="TEACHER", type=os.path.expanduser, help="the model that is the data")
    measuring.add_argument(
        "students", metavar="STUDENT", type=os.path.expanduser, nargs="+", help="the first: baseline"
    )
    measuring.add_argument("--output", metavar="FOLDER", type=user_path, required=True, help="folder of the results")
    measuring.add_argument("--n", type=positive, default=10_000, help="sequences of each model (default: %(default)s)")
    measuring.add_argument("--seed", type=natural, default=1, help="of their samples (default: %(default)s)")
    return parser.parse_args(argv)


Contexts = list[tuple[Tensor, Tensor]]  # batches of codes (B, N) and class labels (B,)


class Loaded(NamedTuple):
    model: ReAR  # in eval mode, on the GPU or the CPU
    weights: TrainedWeights
    sha256: str  # of the weights without projectors


def load(source: str) -> Loaded:
    """The model of a run; raises InputError for missing weights or config."""
    weights = find_weights(source)
    for notice in weights.notices:
        print(notice)
    config, _ = as_trained(load_run_config(source, []), weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_generator(weights.path, config.model).to(device).eval()
    return Loaded(model, weights, weights_sha256(model))


def provenance_of(teacher: Loaded, count: int, seed: int) -> dict[str, Any]:
    device = teacher.model.cls_token.device.type
    return {"sha256 of the teacher": teacher.sha256, "n": count, "seed": seed, "device": device}


def sample(teacher: str, output: Path, count: int, seed: int) -> None:
    """Write the token store, or resume from chunk files."""
    if output.suffix != ".tokens":
        raise InputError(f"{output}: expected a name that ends in .tokens")
    p = load(teacher)
    model, provenance = p.model, provenance_of(p, count=count, seed=seed)
    check_codebook_size(output, model.codebook_size)
    chunk_files = SampleChunks(output.with_suffix(".chunks"), count, SAMPLES_PER_CHUNK)
    if not chunk_files.can_resume and is_made(output, provenance):
        print(f"{output}: already made from the same weights")
        return
    chunk_files.open(provenance)
    samples = ModelSamples(model, seed)
    for chunk in tqdm(chunk_files.missing(), output.name, unit="chunk"):
        parts = [samples(part)[0].cpu().numpy() for part in batches(chunk)]
        chunk_files.save(chunk, np.concatenate(parts).astype(np.uint16))
    meta = StoreMeta(
        image_seq_len=model.image_seq_len,
        codebook_size=model.codebook_size,
        class_names=p.weights.class_names,
        grid_size=edge_of_square(model.image_seq_len),
        tokenizer_sha256=p.weights.tokenizer_sha256,
    )
    with new_token_store(output, meta) as writer:
        for chunk, codes in zip(chunk_files.chunks, chunk_files.load(), strict=True):
            writer.append(codes, class_labels_of(chunk, model.num_classes))
    write_record(output, provenance, files=sorted(output.iterdir()))
    chunk_files.remove()
    print(f"{output}: {count} sequences of {teacher}; train students on it (dataset.params.pretokenization)")


def measure(teacher: str, students: list[str], folder: Path, count: int, seed: int) -> None:
    """Write the results. Students whose results are in the JSON are not measured again."""
    if count < 2:
        raise InputError(f"--n {count}: expected at least 2, for an interval")
    p = load(teacher)
    provenance = provenance_of(p, count=count, seed=seed)
    path = folder / RESULT_FILE
    done = read_json(path)["students"] if is_made(path, provenance) else {}
    known = {result["sha256"]: result for result in done.values()}
    results: dict[str, dict[str, Any]] = {}
    entropy: list[float] = read_json(path)["entropy"] if done else []
    of_teacher: Contexts = []  # sampled when they are needed
    names = names_of_runs(students)
    for name, source in zip(names, students, strict=True):
        q = load(source)
        check_student(source, student=q, teacher=p)
        if q.sha256 not in known:
            of_teacher = of_teacher or contexts_of(p.model, count=count, seed=seed, title="teacher: sampling")
            entropy = entropy or entropy_of(p.model, of_teacher)
            estimates = estimates_of(p.model, q.model, of_teacher, seed=seed, title=name)
            known[q.sha256] = {"sha256": q.sha256, "weights": str(q.weights.path), **estimates}
        results[name] = {**known[q.sha256], "step": q.weights.step}
        write_record(path, provenance, figures={"entropy": entropy, "students": {**done, **results}})
    text = report(results, entropy)
    write_text(folder / TABLE_FILE, f"{text}\n")
    draw(results, folder / FIGURE_FILE)
    print(text, f"look at {folder / FIGURE_FILE}", sep="\n\n")


def check_student(source: str, student: Loaded, teacher: Loaded) -> None:
    """Raises InputError for a student of different sequences; prints a line if it was trained on the teacher's data."""
    for name in ("codebook_size", "image_seq_len", "num_classes"):
        found, expected = getattr(student.model, name), getattr(teacher.model, name)
        if found != expected:
            raise InputError(f"{source}: found {name}={found}, expected {expected}, that of the teacher")
    trained, expected = student.weights.tokenizer_sha256, teacher.weights.tokenizer_sha256
    if None not in (trained, expected) and trained != expected:
        raise InputError(f"{source}: trained on the tokens of another tokenizer than the teacher")
    data = student.weights.record.get("data")
    if data is not None and data == teacher.weights.record.get("data") and student.sha256 != teacher.sha256:
        print(f"{source}: trained on the data of the teacher, not on its samples: the teacher is not what it learned")


def contexts_of(model: ReAR, count: int, seed: int, title: str) -> Contexts:
    """Sequences of a model in batches. The random numbers are the same for all models, which makes differences less
    noisy, and different from the random numbers of `sample`."""
    samples = ModelSamples(model, seed, Stream.ANALYSIS)
    return [samples(indices) for indices in tqdm(batches(range(count)), title, unit="batch", delay=2)]


def entropy_of(p: ReAR, of_teacher: Contexts) -> list[float]:
    """Entropy of the teacher in nats per sequence, [mean, low, high]."""
    return interval(torch.cat([entropies(p, *batch) for batch in of_teacher]).sum(1).numpy())


def estimates_of(p: ReAR, q: ReAR, of_teacher: Contexts, seed: int, title: str) -> dict[str, Any]:
    """`summarize` for a student q."""
    count = sum(len(codes) for codes, _ in of_teacher)
    of_student = contexts_of(q, count=count, seed=seed, title=f"{title}: sampling")
    on_teacher, on_student = (
        [divergences(p, q, *batch) for batch in tqdm(contexts, f"{title}: contexts of {whose}", unit="batch", delay=2)]
        for contexts, whose in ((of_teacher, "the teacher"), (of_student, "the student"))
    )
    return summarize(
        forward=torch.cat([part.p_to_q for part in on_teacher]).numpy(),
        free_running=torch.cat([part.p_to_q for part in on_student]).numpy(),
        reverse=torch.cat([part.q_to_p for part in on_student]).numpy(),
    )


def batches(indices: range) -> list[range]:
    return [indices[start : start + SEQUENCES_AT_ONCE] for start in range(0, len(indices), SEQUENCES_AT_ONCE)]


if __name__ == "__main__":
    with input_errors_exit():
        main()
