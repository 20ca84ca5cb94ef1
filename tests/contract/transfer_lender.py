"""A lender for the suites of `Transfer.fetch`: blocks on a shelf, in place of an engine."""

import asyncio

from shared.blocks import PAGE_TOKENS, key_chain, name_of, root_hash, token_ids
from shared.kv.loan import Loan


def some_keys(num_blocks, salt="salt"):
    """Of a prompt's first blocks."""
    return key_chain(root_hash("m", salt), token_ids(range(num_blocks * PAGE_TOKENS)))


class Shelf:
    """Blocks in pages.

    Attributes:
        pages: by key; whoever takes one away evicts it.
        loans: lent and not given back.
        num_loans: ever.
        open: cleared, a loan is not made before it is set: the engine is in a step.
    """

    def __init__(self, pages):
        self.pages = dict(pages)
        self.loans = set()
        self.num_loans = 0
        self.open = asyncio.Event()
        self.open.set()

    async def lend(self, names):
        await self.open.wait()
        by_name = {name_of(key): key for key in self.pages}
        keys = []
        for name in names:
            if name not in by_name:
                break
            keys.append(by_name[name])
        loan = Loan(tuple(self.pages[key] for key in keys), tuple(keys))
        self.loans.add(loan)
        self.num_loans += 1
        return loan

    def give_back(self, loan):
        self.loans.remove(loan)

    async def all_given_back(self):
        async with asyncio.timeout(10):
            while self.loans:
                await asyncio.sleep(0.001)
