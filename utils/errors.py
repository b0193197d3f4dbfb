"""One clear line for what a user can mend; a traceback for everything else."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user gave is wrong. The message names the file, key or index, what was found and expected."""


class NonFiniteError(InputError):
    """Weights that are finite compute NaN or infinity. The message names the model and what it computed."""


class TrainingError(RuntimeError):
    """A run cannot go on. The message says at which step and why, and what to continue from."""


@contextmanager
def input_errors_exit() -> Iterator[None]:
    """Around a script's main: an InputError or a TrainingError becomes one line on stderr and exit status 1."""
    try:
        yield
    except (InputError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
