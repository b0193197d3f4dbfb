"""The run folder: config, versions and log."""

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
    """Commit, Python, packages and device, one line each."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    lines = [f"commit {commit() or 'unknown'}", f"python {platform.python_version()}"]
    lines += [f"{package} {version(package)}" for package in PACKAGES]
    return "\n".join([*lines, f"device {device}"]) + "\n"


def commit() -> str:
    """git's description of the sources; empty without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8").stdout.strip()
    except OSError:
        return ""


def code_facts() -> dict[str, str]:
    """Hash of the Python sources (`code`) and versions that affect numbers."""
    return {"code": source_hash(), **versions()}


def source_hash() -> str:
    """sha256 of the project's Python files, uncommitted changes included."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class LogFile(logging.FileHandler):
    """Silently drops lines while the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def make_logger(output_dir: Path, is_rank0: bool) -> logging.Logger:
    """A logger to the console and to `<output_dir>/log.txt`, opened by its first line. Silent on ranks other than 0."""
    logger = logging.getLogger("rear")
    while logger.handlers:  # of an earlier run in this process
        with suppress(OSError):
            logger.handlers[0].close()
        logger.removeHandler(logger.handlers[0])
    logger.setLevel(logging.INFO if is_rank0 else logging.CRITICAL)
    logger.propagate = False
    if is_rank0:
        formatter = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
        log_file = LogFile(output_dir / "log.txt", encoding="utf-8", delay=True, errors="backslashreplace")
        for handler in (log_file, logging.StreamHandler()):
            handler.setFormatter(formatter)
            logger.addHandler(handler)
    return logger


@contextmanager
def log_and_continue(logger: logging.Logger, what: str, errors: type[Exception] = OSError) -> Iterator[None]:
    """Log errors of these types inside in one line, for work that training does not depend on; other errors are
    raised."""
    try:
        yield
    except errors as error:
        logger.error(f"{what}: {environment_error(error) or repr(error)}; training continues without")
