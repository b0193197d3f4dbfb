"""Garbage collection between steps."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def manual_gc() -> Iterator[None]:
    """Without automatic garbage collection: it interrupts each rank in another step, and all ranks wait for it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
