"""In what form KV pages travel."""

from enum import StrEnum


class WireFormat(StrEnum):
    """From exact to most lossy."""

    NATIVE = "native"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def loss(self) -> int:
        """Rank by loss; 0 is exact."""
        return _BY_LOSS.index(self)


_BY_LOSS = tuple(WireFormat)
