"""Copies between host and device that neither side waits for.

On the CPU the same code runs with ordinary memory and events that are always past.
"""

# pyright: reportUnknownMemberType=false
# torch types numpy and its events only in part.

from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_UPLOAD_BUFFERS = 3
"""One for the batch that runs, one for the batch behind it, one that the host fills."""

Words = NDArray[np.int32]


class Event(Protocol):
    """A point in the work of the device."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool: ...


class Past:
    """The event of a device that has done everything as soon as it is asked for."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def new_event(device: torch.device) -> Event:
    """An event to record on the current stream; `device`, if a GPU, must be the current one.

    Waiting for it lets other threads of the process run.
    """
    return cast("Event", torch.cuda.Event(blocking=False)) if device.type == "cuda" else Past()


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in host memory that `device` copies from and to without the host's help."""
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")


class Uploads:
    """Sends int32 words to one place on the device, in the order of its stream.

    Attributes:
        words: the place, `[num_words]`; its address never changes.
        num_sent: uploads so far.
    """

    def __init__(self, num_words: int, device: torch.device) -> None:
        self.words = torch.zeros(num_words, dtype=torch.int32, device=device)
        self.num_sent = 0
        self._buffers = [host_tensor((num_words,), torch.int32, device) for _ in range(NUM_UPLOAD_BUFFERS)]
        self._arrays = [cast("Words", buffer.numpy()) for buffer in self._buffers]
        self._copied = [new_event(device) for _ in range(NUM_UPLOAD_BUFFERS)]

    def send(self, words: Words) -> None:
        """Put `words` at the beginning of the place; what was launched before still sees the old ones."""
        turn = self.num_sent % NUM_UPLOAD_BUFFERS
        self._copied[turn].synchronize()
        self._arrays[turn][: len(words)] = words
        self.words[: len(words)].copy_(self._buffers[turn][: len(words)], non_blocking=True)
        self._copied[turn].record()
        self.num_sent += 1
