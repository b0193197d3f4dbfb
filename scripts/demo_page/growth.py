"""Images while their codes are sampled.

Legend: B images, N codes per image.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event

import torch
from torch import Tensor

from modeling.sampling.cached_decoding import DecodingState
from modeling.sampling.generate import CodeSampler

Frame = tuple[Tensor, Tensor]  # codes (B, N), and which of them are sampled or known, (B, N) bool


def growing_codes(
    sampler: CodeSampler, sample: Callable[[Callable[[], object]], Tensor], frames: int, known: int = 0
) -> Iterator[Frame]:
    """Codes in raster order at `frames` moments of their sampling, equally apart, and at its end.

    They are sampled in a thread of their own, which does not wait for whoever looks at the frames. It ends at its next
    code when the iterator is closed.

    Args:
        sample: codes (B, N), by `sampler`, given what is to be called after each of the N positions.
        known: so many codes of each image are not sampled and come first.

    Raises:
        Exception: what `sample` raises.
    """
    unknown = sampler.steps - known
    moments = {known + unknown * i // (frames + 1) for i in range(1, frames + 1)} - {known}
    arrived: SimpleQueue[Frame | None] = SimpleQueue()
    closed, done = Event(), 0

    def on_step() -> None:
        nonlocal done
        done += 1
        if closed.is_set():
            raise CancelledError
        if done in moments and sampler.state is not None:
            arrived.put(codes_so_far(sampler.state, done))

    def run() -> Tensor:
        try:
            return sample(on_step)
        finally:
            arrived.put(None)

    with ThreadPoolExecutor(1) as thread:
        codes = thread.submit(run)
        try:
            while (frame := arrived.get()) is not None:
                yield frame
            yield codes.result(), torch.ones_like(codes.result(), dtype=torch.bool)
        finally:
            closed.set()


def codes_so_far(state: DecodingState, done: int) -> Frame:
    """The first `done` codes of each image in its order. The others repeat them: decoders normalize over the whole
    picture, and would show these in other colours beside codes that do not belong to them."""
    positions = torch.arange(state.codes.shape[1], device=state.codes.device)
    codes = torch.empty_like(state.codes).scatter_(1, state.orders, state.codes[:, positions % done])
    return codes, torch.zeros_like(codes, dtype=torch.bool).scatter_(1, state.orders[:, :done], True)
