"""Errors that a user can fix become one line; bugs keep their traceback and ask for a report."""

import codecs
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from utils.console import printable_text, unbreakable_console
from utils.run.signals import end_on_sigterm

REPORT = (
    "This is a bug in re-ar. Please report it with the lines above, the command and the config, where you got the "
    "program (see CONTRIBUTING.md)."
)
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")  # by name: torch may not be imported
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"  # in torch's message
PROCESSES = (
    "too many processes or threads: raise the limit (ulimit -u, or that of the container) or lower "
    "dataset.params.num_workers_per_gpu or --processes"
)
# In messages of torch and Triton.
NO_COMPILER = re.compile(r"No working C\+\+ compiler|Failed to find C compiler|Python\.h: No such file")
INSTALL_COMPILER = (
    "compile=on: found no working C++ compiler; install g++ and Python's headers, or leave out training.compile=on and "
    "sampling.compile=on"
)


class InputError(ValueError):
    """A user's input is wrong. The message, one line: file, key or index, what was found, what was expected."""

    def __init__(self, message: str) -> None:
        super().__init__(printable_text(message))  # file names and values may contain line ends and terminal codes


class NonFiniteError(InputError):
    """Finite weights computed NaN or infinity. The message names the model and the values."""


class TrainingError(RuntimeError):
    """A run cannot continue. The message says at which step, why, and from where to resume."""


@contextmanager
def errors_name(path: object) -> Iterator[None]:
    """Add `path` to an OSError inside that names no file, as from reading, writing and flushing an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.strerror = error.strerror or first_line(error)  # numpy's have neither number nor name
            error.filename = str(path)
        raise


@contextmanager
def input_errors_exit() -> Iterator[None]:
    """Around a script's main: print errors that the user can fix as one line on stderr and exit with status 1.

    These are InputError, TrainingError, OSError, lack of memory or processes, and a missing compiler. Ctrl-C ends at
    once. Any other exception is a bug and ends with its traceback and a request for a report. Inside, a broken console
    raises nothing. From here on, SIGTERM ends the process, and so does the end of its launcher (see `end_on_sigterm`).
    """
    end_on_sigterm()
    with unbreakable_console():
        try:
            yield
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)  # as shells expect, and without waiting for threads
        except Exception as error:
            line = environment_error(error)
            if line is None:
                traceback.print_exception(error)
            print(REPORT if line is None else f"error: {line}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None


def environment_error(error: BaseException) -> str | None:
    """The line to print for an error that the user can fix; None for a bug."""
    if isinstance(error, InputError | TrainingError):
        return str(error)
    if is_out_of_processes(error):
        return PROCESSES
    if isinstance(error, RuntimeError) and NO_COMPILER.search(str(error)):
        return INSTALL_COMPILER
    if isinstance(error, OSError):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*names, error.strerror or first_line(error)])
    if isinstance(error, UnicodeEncodeError) and is_codec_of_names(error.encoding):
        return f"{error.object}: cannot be the name of a file in the locale's {error.encoding}; set PYTHONUTF8=1"
    if is_out_of_memory(error):
        return f"out of memory: {first_line(error)}; a smaller batch needs less"
    return None


def is_codec_of_names(encoding: str) -> bool:
    """Whether names of files have this encoding, which follows from the locale; never UTF-8, which has all letters."""
    name = codecs.lookup(encoding).name
    return name == codecs.lookup(sys.getfilesystemencoding()).name != "utf-8"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether GPU or host memory is exhausted."""
    return type(error).__name__ in OUT_OF_MEMORY or (isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error))


def is_out_of_processes(error: BaseException) -> bool:
    """Whether no further process or thread can start."""
    again = "can't start new thread" in str(error) or os.strerror(errno.EAGAIN) in str(error)
    return again and isinstance(error, RuntimeError | OSError) and getattr(error, "filename", None) is None


def first_of(items: Sequence[object], count: int = 3) -> str:
    """The first items, for a message."""
    return ", ".join(map(str, items[:count])) + (", ..." if len(items) > count else "")


def first_line(error: BaseException) -> str:
    """The first line of the message, or the error's type if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
