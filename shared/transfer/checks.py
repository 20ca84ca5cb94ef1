"""What of a pull or a fetch can never work, or is not allowed."""

from collections.abc import Iterable, Sequence

from shared.blocks import BlockKey, pages_for
from shared.errors import LayoutMismatch
from shared.kv.paged_cache import PagedCache
from shared.kv.wire_format import page_formats
from shared.transfer.port import MAX_FETCH_BLOCKS
from shared.wire.to_worker import KvTicket
from shared.wire.wire_format import WireFormat


def check_pages(cache: PagedCache, pages: Sequence[int]) -> None:
    """Raise ValueError unless `pages` are pages of `cache`, each named once."""
    if len(set(pages)) != len(pages):
        raise ValueError("a page is named twice")
    for page in pages:
        if not 0 <= page < cache.num_pages:
            raise ValueError(f"page {page} is outside the cache of {cache.num_pages} pages")


def check_pull(cache: PagedCache, ticket: KvTicket, want: Sequence[int], into: Sequence[int]) -> None:
    """Raise what `Transfer.pull` says of arguments that can never work."""
    if ticket.layout_fingerprint != cache.layout.fingerprint:
        raise LayoutMismatch(
            f"the ticket is for layout {ticket.layout_fingerprint}, ours is {cache.layout.fingerprint}"
        )
    if len(want) != len(into):
        raise ValueError(f"{len(want)} pages are wanted into {len(into)} pages")
    num_pages = pages_for(ticket.num_tokens)
    if len(set(want)) != len(want) or any(not 0 <= index < num_pages for index in want):
        raise ValueError(f"wanted pages are distinct indexes below {num_pages}")
    check_pages(cache, into)


def check_fetch(cache: PagedCache, keys: Sequence[BlockKey], into: Sequence[int]) -> None:
    """Raise what `Transfer.fetch` says of arguments that can never work."""
    if not 1 <= len(keys) <= MAX_FETCH_BLOCKS:
        raise ValueError(f"{len(keys)} blocks are wanted, between 1 and {MAX_FETCH_BLOCKS} can be")
    if len(keys) != len(into):
        raise ValueError(f"{len(keys)} blocks are wanted into {len(into)} pages")
    check_pages(cache, into)


def is_allowed(max_loss: WireFormat, fmt: WireFormat, indexes: Iterable[int]) -> bool:
    """Whether these pages of a prompt, of which `max_loss` is allowed, may come in `fmt`."""
    return fmt.loss == 0 or all(fmt.loss <= page_formats(max_loss, index).loss for index in indexes)
