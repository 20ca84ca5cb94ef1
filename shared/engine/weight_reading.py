"""Safetensors files: their headers, and their tensors' bytes read into tensors at the speed of disk or page cache.

header ──> StoredTensor (name, shape, where its bytes lie) ──> TensorCopy (to which place)
                                                                    │ cut into pieces
reading threads, each:  piece of the file ──> staging buffer (pinned) ──> place on the device
"""

import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import cycle
from operator import index
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from shared.errors import StartupError

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What the format calls the dtypes that torch has."""

LENGTH_BYTES = 8
"""A file begins with the header's length."""

Report = Callable[[int, int], None]
"""Called with the bytes read so far and those to read in all; from any thread, by one at a time."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor's bytes lie.

    Attributes:
        offset: of its first byte in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file whose header has been read.

    Attributes:
        header: as it stands in the file (JSON).
    """

    path: Path
    num_bytes: int
    header: bytes
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """One tensor to read, and the contiguous tensor of as many elements that it fills, converted to its dtype."""

    source: StoredTensor
    place: Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """How files are read: each thread has two staging buffers of `piece_bytes` and reads into one while the other
    goes to the device."""

    num_threads: int
    piece_bytes: int


READING = {"cpu": Reading(num_threads=1, piece_bytes=8 * 2**20), "cuda": Reading(num_threads=8, piece_bytes=16 * 2**20)}
"""By the kind of device."""


@dataclass(frozen=True, slots=True)
class _Piece:
    path: Path
    offset: int
    dtype: torch.dtype
    place: Tensor

    @property
    def num_bytes(self) -> int:
        return self.place.numel() * self.dtype.itemsize


@dataclass(slots=True)
class _Buffer:
    """A staging buffer, uint8, and on CUDA the event after which it may be written again."""

    bytes: Tensor
    copied: torch.cuda.Event | None


def read_header(path: Path) -> WeightFile:
    """Read the header of a safetensors file. Raises StartupError if it is none or is cut short."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > num_bytes - LENGTH_BYTES:
            raise StartupError(f"{path} is no safetensors file")
        header = file.read(length)
    try:
        entries = cast("dict[str, Any]", json.loads(header))
        tensors = tuple(
            _stored_tensor(path, name, entry, LENGTH_BYTES + length)
            for name, entry in entries.items()
            if name != "__metadata__"
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StartupError(f"{path} is no safetensors file: {error!r}") from error
    end = max((tensor.offset + tensor.num_bytes for tensor in tensors), default=LENGTH_BYTES + length)
    if end != num_bytes:
        raise StartupError(f"{path} cannot be read: it has {num_bytes} bytes and its header speaks of {end}")
    return WeightFile(path, num_bytes, header, tensors)


def _stored_tensor(path: Path, name: str, entry: dict[str, Any], data_offset: int) -> StoredTensor:
    """Raises ValueError, TypeError or KeyError for an entry that makes no sense."""
    begin, end = (index(offset) for offset in entry["data_offsets"])
    shape = tuple(index(size) for size in entry["shape"])
    dtype = STORED_DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"{name} is of the unknown dtype {entry['dtype']}")
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {list(shape)} does not fill the bytes {begin} to {end}")
    return StoredTensor(name, dtype, shape, path, data_offset + begin, end - begin)


def samples(file: WeightFile, sample_bytes: int) -> Iterator[bytes]:
    """The middle `sample_bytes` of each tensor, by name; all of a smaller one."""
    with file.path.open("rb", buffering=0) as opened:
        for tensor in sorted(file.tensors, key=lambda tensor: tensor.name):
            num_bytes = min(tensor.num_bytes, sample_bytes)
            yield os.pread(opened.fileno(), num_bytes, tensor.offset + (tensor.num_bytes - num_bytes) // 2)


def read_tensors(copies: Sequence[TensorCopy], device: torch.device, reading: Reading, report: Report) -> None:
    """Fill every place, all of them on `device`; the bytes are there for every stream on return.

    Raises StartupError for a file that ends early, OSError for one that cannot be read.
    """
    pieces = deque(_cut(copies, reading.piece_bytes))
    progress = _Progress(sum(piece.num_bytes for piece in pieces), report)
    with ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb", buffering=0)).fileno() for path in _paths(copies)}
        pool = stack.enter_context(ThreadPoolExecutor(reading.num_threads, thread_name_prefix="weights"))
        threads = [
            pool.submit(_copy_pieces, pieces, files, device, reading.piece_bytes, progress)
            for _ in range(reading.num_threads)
        ]
        for thread in threads:
            thread.result()


def _paths(copies: Iterable[TensorCopy]) -> list[Path]:
    return sorted({copy.source.path for copy in copies})


def _cut(copies: Iterable[TensorCopy], piece_bytes: int) -> Iterator[_Piece]:
    """In the order of the files' bytes, so that together the threads read each file from its begin to its end."""
    for copy in sorted(copies, key=lambda copy: (copy.source.path, copy.source.offset)):
        source, place = copy.source, copy.place.view(-1)
        piece_elements = piece_bytes // source.dtype.itemsize
        for first in range(0, place.numel(), piece_elements):
            offset = source.offset + first * source.dtype.itemsize
            yield _Piece(source.path, offset, source.dtype, place[first : first + piece_elements])


class _Progress:
    def __init__(self, num_bytes: int, report: Report) -> None:
        self._num_bytes = num_bytes
        self._report = report
        self._num_read = 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._num_read += num_bytes
            self._report(self._num_read, self._num_bytes)


def _copy_pieces(
    pieces: deque[_Piece], files: dict[Path, int], device: torch.device, piece_bytes: int, progress: _Progress
) -> None:
    """One thread's share: takes piece after piece until none is left, or until one of the threads fails."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    buffers = cycle([_make_buffer(piece_bytes, stream) for _ in range(2)])
    try:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            while True:
                try:
                    piece = pieces.popleft()
                except IndexError:
                    break
                _copy_piece(piece, files[piece.path], next(buffers))
                progress.add(piece.num_bytes)
    except BaseException:
        pieces.clear()
        raise
    finally:
        if stream is not None:
            stream.synchronize()


def _make_buffer(num_bytes: int, stream: torch.cuda.Stream | None) -> _Buffer:
    return _Buffer(
        torch.empty(num_bytes, dtype=torch.uint8, pin_memory=stream is not None),
        None if stream is None else torch.cuda.Event(),
    )


def _copy_piece(piece: _Piece, file: int, buffer: _Buffer) -> None:
    if buffer.copied is not None:
        buffer.copied.synchronize()  # one that was never recorded has passed
    staged = buffer.bytes[: piece.num_bytes]
    _read_exactly(file, piece, memoryview(cast("Any", staged.numpy())))
    staged = staged.view(piece.dtype)
    if piece.place.dtype != piece.dtype:
        staged = staged.to(piece.place.device, non_blocking=True)  # a copy that converts would do so on the CPU
    piece.place.copy_(staged, non_blocking=True)
    if buffer.copied is not None:
        buffer.copied.record()


def _read_exactly(file: int, piece: _Piece, into: memoryview) -> None:
    filled = 0
    while filled < len(into):
        num_bytes = os.preadv(file, [into[filled:]], piece.offset + filled)
        if num_bytes == 0:
            raise StartupError(f"{piece.path} cannot be read: it ends at byte {piece.offset + filled}")
        filled += num_bytes
