"""Reading of a record batch (format 2, not compressed, as topics keep them) in which header names may be any bytes."""
# pyright: reportMissingTypeStubs=false

import struct
from dataclasses import dataclass

from aiokafka.errors import UnsupportedCodecError
from aiokafka.record.util import decode_varint

_FRAME = struct.Struct(">qi")
"""Offset of the first record, bytes behind this."""

_HEAD = struct.Struct(">iBIhiqqqhii")
"""Behind the frame: leader epoch, magic, checksum, attributes, last offset, first and largest timestamp, producer's id,
epoch and sequence, number of records."""

_COMPRESSION = 0b0111
_APPEND_TIME = 0b1000


@dataclass(frozen=True, slots=True)
class FoundRecord:
    """As aiokafka gives them; `timestamp` in ms. Bytes of a header's name that are no UTF-8 are replaced."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


def num_batch_bytes(batches: bytes, start: int) -> int:
    """Size of the batch at `start`."""
    return _FRAME.size + _FRAME.unpack_from(batches, start)[1]


def records_of(batch: bytes) -> list[FoundRecord]:
    """The records of a whole batch whose checksum was found right. Raises UnsupportedCodecError if it is compressed."""
    first_offset, _ = _FRAME.unpack_from(batch)
    _, _, _, attributes, _, first_ms, largest_ms, _, _, _, num_records = _HEAD.unpack_from(batch, _FRAME.size)
    if attributes & _COMPRESSION:
        raise UnsupportedCodecError("header names that are no UTF-8, in a compressed batch")
    fields = _Fields(bytearray(batch), _FRAME.size + _HEAD.size)
    found: list[FoundRecord] = []
    for _ in range(num_records):
        fields.number()  # the record's size
        fields.at += 1  # its attributes: none are defined
        timestamp_ms = first_ms + fields.number()
        found.append(
            FoundRecord(
                offset=first_offset + fields.number(),
                timestamp=largest_ms if attributes & _APPEND_TIME else timestamp_ms,
                key=fields.run(),
                value=fields.run(),
                headers=tuple(fields.header() for _ in range(fields.number())),
            )
        )
    return found


class _Fields:
    """Reads one after the other; `at` is where the next begins."""

    def __init__(self, data: bytearray, at: int) -> None:
        self._data = data
        self.at = at

    def number(self) -> int:
        number, self.at = decode_varint(self._data, self.at)
        return number

    def run(self) -> bytes | None:
        """Bytes with their length before them; -1 is None."""
        length = self.number()
        if length < 0:
            return None
        start, self.at = self.at, self.at + length
        return bytes(self._data[start : self.at])

    def header(self) -> tuple[str, bytes | None]:
        name = self.run() or b""
        return name.decode("utf-8", "replace"), self.run()
