"""Text of a growing answer, token by token."""

from codecs import getincrementaldecoder
from collections.abc import Iterable

from shared.text.tokeniser import Tokeniser

_Utf8Decoder = getincrementaldecoder("utf-8")


class Detokeniser:
    """Turns token ids into text as they come and never shows half a character.

    What was returned after k ids is a pure function of those ids, however they were cut into pushes. Bytes that can
    never become a character are shown as U+FFFD, one for each maximal run that could have begun one. The answer
    continues a prompt, so a space at its start is kept.
    """

    def __init__(self, tokeniser: Tokeniser) -> None:
        self._tokeniser = tokeniser
        self._decoder = _Utf8Decoder("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain now and was not before."""
        return self._decoder.decode(b"".join(map(self._tokeniser.visible_bytes, ids)))

    def flush(self) -> str:
        """The end: what was begun and never completed, as U+FFFD."""
        return self._decoder.decode(b"", final=True)
