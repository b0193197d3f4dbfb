"""One clear line for what a user can mend; a traceback for our own mistakes, which says that it is one."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from utils.console import lasting_console

REPORT = (
    "This is a mistake of re-ar, not yours. Please report it with the lines above, the command and the config, where "
    "you got the program from (CONTRIBUTING.md)."
)
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")  # of Python and of torch, which is not imported for it
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"  # in torch's message


class InputError(ValueError):
    """Something the user gave is wrong. The message, one line, names the file, key or index, what was found and what is
    expected."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\n", "\\n"))  # names of files and values may hold any character


class NonFiniteError(InputError):
    """Weights that are finite compute NaN or infinity. The message names the model and what it computed."""


class TrainingError(RuntimeError):
    """A run cannot go on. The message says at which step and why, and what to continue from."""


@contextmanager
def input_errors_exit() -> Iterator[None]:
    """Around a script's main: what the user or the machine has to mend becomes one line on stderr and exit status 1.

    That is an InputError, a TrainingError, any OSError and want of memory; Ctrl-C ends at once. All else is a mistake
    of the program: its traceback ends with a line that says so. The console may break without harm meanwhile.
    """
    with lasting_console():
        try:
            yield
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)  # as shells expect it, and no thread holds up the end
        except Exception as error:
            line = environment_error(error)
            if line is None:
                traceback.print_exception(error)
            print(REPORT if line is None else f"error: {line}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None


def environment_error(error: BaseException) -> str | None:
    """What to tell of an error that is not ours; None for one that is."""
    if isinstance(error, InputError | TrainingError):
        return str(error)
    if isinstance(error, OSError):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*names, error.strerror or first_line(error)])
    if is_out_of_memory(error):
        return f"out of memory: {first_line(error)}; a smaller batch needs less"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of this machine."""
    return type(error).__name__ in OUT_OF_MEMORY or (isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error))


def first_line(error: BaseException) -> str:
    """The first line of its message, or its kind if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
