"""In what form KV pages travel."""

from dataclasses import dataclass

from shared.blocks import PAGE_TOKENS
from shared.kv.layout import KvLayout
from shared.wire.wire_format import WireFormat as WireFormat

_CODE_BITS = {WireFormat.INT8: 8, WireFormat.INT4: 4}
_FLOAT16_BYTES = 2


@dataclass(frozen=True, slots=True)
class LayerSpan:
    """Layers [first, end)."""

    first: int
    end: int

    @property
    def num_layers(self) -> int:
        return self.end - self.first


def packed_bytes(layout: KvLayout, fmt: WireFormat, num_pages: int, num_layers: int) -> int:
    """Bytes of `num_layers` layers of `num_pages` pages in form `fmt`; scales and zeros included."""
    if fmt is WireFormat.NATIVE:
        return num_pages * num_layers * (layout.page_bytes // layout.num_layers)
    code_bytes = PAGE_TOKENS * layout.head_dim * _CODE_BITS[fmt] // 8
    k_bytes = code_bytes + 2 * layout.head_dim * _FLOAT16_BYTES
    v_bytes = code_bytes + (1 if fmt is WireFormat.INT8 else 2) * PAGE_TOKENS * _FLOAT16_BYTES
    return num_pages * num_layers * layout.num_kv_heads * (k_bytes + v_bytes)
