"""What came and went of a set of blocks, for whoever asks now and then."""

from collections.abc import Container

from shared.blocks import BlockHash


class NetChanges:
    """Hashes that came and went since last asked, net: one that came and went in between is in neither."""

    def __init__(self) -> None:
        self._came: dict[BlockHash, None] = {}  # dicts keep the order
        self._went: dict[BlockHash, None] = {}

    def add(self, block_hash: BlockHash) -> None:
        """It came."""
        if block_hash in self._went:
            del self._went[block_hash]
        else:
            self._came[block_hash] = None

    def remove(self, block_hash: BlockHash) -> None:
        """It went."""
        if block_hash in self._came:
            del self._came[block_hash]
        else:
            self._went[block_hash] = None

    def take(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """Those that came and those that went since the last call."""
        changes = tuple(self._came), tuple(self._went)
        self._came.clear()
        self._went.clear()
        return changes

    def check(self, there: Container[BlockHash]) -> None:
        """Raise AssertionError unless those that came are among what is `there`, and those that went are not."""
        assert not self._came.keys() & self._went.keys(), "a hash both came and went"
        assert all(block_hash in there for block_hash in self._came), "a hash came and is not there"
        assert not any(block_hash in there for block_hash in self._went), "a hash went and is there"
