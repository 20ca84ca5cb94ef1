"""How far a batch is while the device computes it: marks behind the stores of keys and values.

device   ── layers 0-3 ──┬── layers 4-7 ──┬── ... ── logits ── draw ──┤
                      4 stored         8 stored                   all done
"""

from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Protocol

import torch

from shared.engine.host_copies import new_event
from shared.kv.progress import layers_a_mark


class Passed(Protocol):
    """A point in the work of the device that was recorded."""

    def query(self) -> bool:
        """Whether the device has passed it; does not wait."""
        ...


class LayerMarks:
    """How far one batch is, a `shared.kv.progress.LayersDone`: asked by any thread, written by the one that launches.

    It never goes back. With no mark recorded it goes from 0 to all layers when the batch has been waited for.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._num_done = 0
        self._recorded: deque[tuple[int, Passed]] = deque()  # layers behind which the point lies, in their order
        self._lock = Lock()

    def num_done(self) -> int:
        """Layers, counted from the first, whose KV of the batch is in the pages."""
        with self._lock:
            while self._recorded and self._recorded[0][1].query():
                self._num_done, _ = self._recorded.popleft()
            return self._num_done

    def recorded(self, num_layers: int, point: Passed) -> None:
        """`point` lies behind the first `num_layers` layers' stores.

        It has been recorded: an event that has not says it is passed. Once this batch is done, `point` may be recorded
        again, behind a later one.
        """
        with self._lock:
            self._recorded.append((num_layers, point))

    def done(self) -> None:
        """The batch has been waited for."""
        with self._lock:
            self._recorded.clear()
            self._num_done = self._num_layers


class LayerEvents:
    """The events of a runner's batches in flight, made once and recorded again and again on one stream.

    Args:
        num_batches: in flight at most.
    """

    def __init__(self, num_layers: int, num_batches: int, device: torch.device) -> None:
        self._num_layers = num_layers
        self._every = 1 if device.type == "cpu" else layers_a_mark(num_layers)
        num_marks = -(-num_layers // self._every)
        self._turns = deque([new_event(device) for _ in range(num_marks)] for _ in range(num_batches))

    def marking(self, marks: LayerMarks) -> Callable[[int], None]:
        """For one batch: to be called with each layer's number behind the launch of its stores, on their stream."""
        events = self._turns[0]
        self._turns.rotate(-1)

        def stored(layer: int) -> None:
            num_stored = layer + 1
            if num_stored % self._every == 0 or num_stored == self._num_layers:
                event = events[layer // self._every]
                event.record()
                marks.recorded(num_stored, event)

        return stored
