"""How KV lies in memory: one page is one contiguous run `[layer][2][PAGE_TOKENS][kv_head][head_dim]`."""

from dataclasses import dataclass
from hashlib import sha256

from shared.blocks import PAGE_TOKENS

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of the KV of one model.

    Attributes:
        model_fingerprint: names the weights; pages of different weights never mix.
        dtype: "float32" or "bfloat16".
    """

    model_fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """`[layer, K or V, token, kv_head, head_dim]` of one page."""
        return (self.num_layers, 2, PAGE_TOKENS, self.num_kv_heads, self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.num_layers * self.layer_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one page, keys and values."""
        return 2 * PAGE_TOKENS * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def fingerprint(self) -> str:
        """What two workers must agree on before a page may travel between them; 32 hex digits."""
        text = f"page-major/1 {self.page_shape} {self.dtype} {self.model_fingerprint}"
        return sha256(text.encode()).hexdigest()[:32]
