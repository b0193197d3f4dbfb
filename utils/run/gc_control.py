"""Garbage collection between steps, on all ranks at the same ones."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 100  # steps


@contextmanager
def gc_between_steps() -> Iterator[Callable[[int], None]]:
    """Gives a function to call before each step, which collects at every 100th. Python by itself would do so in the
    middle of any step, on each rank at another one, and all ranks would wait for it. What exists already is not looked
    at again."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()

    def before_step(step: int) -> None:
        if step % EVERY == 0:
            gc.collect()

    try:
        yield before_step
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
