"""In what form KV pages travel, and how many bytes they take in it.

`NATIVE` is a page as it lies, or a run of its layers. A lossy format has for each (page, layer, KV head), in this
order, one record of

    K codes [64, head_dim] | K scale, zero [head_dim] | V codes [64, head_dim] | V scale [64] (INT4: and zero [64])

with scales and zeros in float16. Keys have large constant channels, so they are coded by channel, asymmetrically over
the 64 tokens of the page: value = zero + scale * code. Values are coded by token, in INT8 symmetrically: value =
scale * (code - 128), in INT4 like keys. A code of INT8 is a byte; one of INT4 is half of a byte, whose low half belongs
to token t and whose high half to token t + 32.

By channel for keys, by token for values: KIVI (Liu et al., 2024).
"""

from dataclasses import dataclass

from shared.blocks import PAGE_TOKENS
from shared.kv.layout import KvLayout
from shared.wire.wire_format import WireFormat

HALF_BYTES = 2
"""Of a scale or zero."""


@dataclass(frozen=True, slots=True)
class LayerSpan:
    """Layers [first, end)."""

    first: int
    end: int

    @property
    def num_layers(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True)
class Record:
    """Where the parts of one record of a lossy format begin, in bytes.

    Every offset and the size are multiples of 64 if `head_dim` is one of 16, and even in any case.
    """

    k_scale: int
    k_zero: int
    v_codes: int
    v_scale: int
    v_zero: int
    num_bytes: int

    @classmethod
    def of(cls, fmt: WireFormat, head_dim: int) -> "Record":
        """Raises ValueError for NATIVE, which has no records."""
        if fmt is WireFormat.NATIVE:
            raise ValueError("native pages have no records")
        code_bytes = PAGE_TOKENS * head_dim // (2 if fmt is WireFormat.INT4 else 1)
        k_zero = code_bytes + head_dim * HALF_BYTES
        v_codes = k_zero + head_dim * HALF_BYTES
        v_scale = v_codes + code_bytes
        v_zero = v_scale + PAGE_TOKENS * HALF_BYTES
        num_bytes = v_zero + (PAGE_TOKENS * HALF_BYTES if fmt is WireFormat.INT4 else 0)
        return cls(code_bytes, k_zero, v_codes, v_scale, v_zero, num_bytes)


def packed_bytes(layout: KvLayout, fmt: WireFormat, num_pages: int, num_layers: int) -> int:
    """Bytes of `num_layers` layers of `num_pages` pages in `fmt`."""
    if fmt is WireFormat.NATIVE:
        return num_pages * num_layers * layout.layer_bytes
    return num_pages * num_layers * layout.num_kv_heads * Record.of(fmt, layout.head_dim).num_bytes


def page_formats(fmt: WireFormat, index: int) -> WireFormat:
    """What page `index` of a prompt travels in where the prompt travels in `fmt`.

    The first page of an INT4 prompt is INT8: the first tokens draw much of all attention.
    """
    return WireFormat.INT8 if fmt is WireFormat.INT4 and index == 0 else fmt
