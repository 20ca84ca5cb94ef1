"""The tensor that holds the pages of one engine."""

import torch

from shared.kv.layout import KvLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PagedCache:
    """KV of one model on one device, allocated once.

    Attributes:
        layout: shape of a page.
        pages: `[num_pages, layer, K or V, PAGE_TOKENS, kv_head, head_dim]`, of the layout's dtype.
    """

    def __init__(self, layout: KvLayout, num_pages: int, device: torch.device) -> None:
        self.layout = layout
        self.pages = torch.zeros((num_pages, *layout.page_shape), dtype=TORCH_DTYPES[layout.dtype], device=device)

    @property
    def num_pages(self) -> int:
        return self.pages.shape[0]

    @property
    def device(self) -> torch.device:
        return self.pages.device
