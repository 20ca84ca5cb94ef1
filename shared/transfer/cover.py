"""Which of the wanted pages and layers have been announced: each must be exactly once."""

from shared.kv.wire_format import LayerSpan


class Cover:
    """Entries of a pull times layers.

    Attributes:
        num_left: pairs of an entry and a layer that are not covered.
    """

    def __init__(self, num_entries: int, num_layers: int) -> None:
        self._num_entries = num_entries
        self._num_layers = num_layers
        self._covered = bytearray(num_entries * num_layers)  # layer by layer
        self.num_left = len(self._covered)

    def add(self, start: int, end: int, layers: LayerSpan) -> None:
        """Cover `layers` of entries [start, end).

        Raises ValueError, having changed nothing, where something is outside, empty, or covered already.
        """
        if not (0 <= start < end <= self._num_entries and 0 <= layers.first < layers.end <= self._num_layers):
            raise ValueError(f"entries {start} to {end}, layers {layers.first} to {layers.end} are outside the pull")
        rows = [layer * self._num_entries for layer in range(layers.first, layers.end)]
        if any(self._covered.find(1, row + start, row + end) >= 0 for row in rows):
            raise ValueError(f"of entries {start} to {end}, layers {layers.first} to {layers.end} some came before")
        for row in rows:
            self._covered[row + start : row + end] = b"\1" * (end - start)
        self.num_left -= (end - start) * layers.num_layers
