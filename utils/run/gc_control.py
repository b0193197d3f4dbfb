"""Garbage collection between steps."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def manual_gc() -> Iterator[None]:
    """Without automatic garbage collection: it would interrupt each rank at a different step while the others wait."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
