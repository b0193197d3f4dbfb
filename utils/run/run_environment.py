"""The run folder: what was run, on what, and its log."""

import hashlib
import logging
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch

from utils.config import ROOT, Config, save_config
from utils.errors import environment_error
from utils.files.atomic import write_text
from utils.run.manifest import VERSIONED_PACKAGES, versions

PACKAGES = [*VERSIONED_PACKAGES, "omegaconf"]
SOURCE_FOLDERS = ("scripts", "modeling", "data", "evaluation", "utils")


def prepare_run_folder(config: Config) -> Path:
    """Create `experiment.output_dir` with config.yaml (resolved) and environment.txt."""
    output_dir = Path(config.experiment.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, output_dir / "config.yaml")
    write_text(output_dir / "environment.txt", describe_environment())
    return output_dir


def describe_environment() -> str:
    """Commit, Python, packages and device, a line each."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    lines = [f"commit {commit() or 'unknown'}", f"python {platform.python_version()}"]
    lines += [f"{package} {version(package)}" for package in PACKAGES]
    return "\n".join([*lines, f"device {device}"]) + "\n"


def commit() -> str:
    """Of the sources; empty without git or without its folder."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def code_facts() -> dict[str, str]:
    """Hash of the Python sources and the versions that change numbers."""
    return {"code": source_hash(), **versions()}


def source_hash() -> str:
    """sha256 of the project's Python files; unlike a commit it sees changes that are not committed."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class LogFile(logging.FileHandler):
    """A full disk costs lines of the log, not the run, and nothing is said to the console for each of them."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def make_logger(output_dir: Path, is_rank0: bool) -> logging.Logger:
    """A logger to `<output_dir>/log.txt` and the console on the main process, silent on the others."""
    logger = logging.getLogger("rear")
    while logger.handlers:  # of an earlier run in this process
        with suppress(OSError):
            logger.handlers[0].close()
        logger.removeHandler(logger.handlers[0])
    logger.setLevel(logging.INFO if is_rank0 else logging.CRITICAL)
    logger.propagate = False
    if is_rank0:
        formatter = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
        log_file = LogFile(output_dir / "log.txt", encoding="utf-8", errors="backslashreplace")
        for handler in (log_file, logging.StreamHandler()):
            handler.setFormatter(formatter)
            logger.addHandler(handler)
    return logger


@contextmanager
def log_and_continue(logger: logging.Logger, what: str, errors: type[Exception] = OSError) -> Iterator[None]:
    """Around what can be made again later: a full disk there is one line in the log, and training goes on.

    Args:
        errors: what is no reason to end training; for pictures, anything.
    """
    try:
        yield
    except errors as error:
        logger.error(f"{what}: {environment_error(error) or repr(error)}; training goes on without")
