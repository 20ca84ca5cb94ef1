"""Pages of one cache that another worker copies."""

from dataclasses import dataclass

from shared.blocks import BlockKey


@dataclass(frozen=True, slots=True, eq=False)
class Loan:
    """Pages kept for a peer, which holds none of them: they stay findable, and nobody gets them for something else.
    Compared by identity.

    Attributes:
        pages: in the order of the blocks that were asked for, from the first on as far as they are here.
        keys: of those blocks.
    """

    pages: tuple[int, ...]
    keys: tuple[BlockKey, ...]
