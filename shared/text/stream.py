"""The text of one choice, made the same way by the worker that ends it and by the edge that shows it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from shared.request import SamplingParams
from shared.text.detokenise import Detokeniser
from shared.text.stop import StopMatcher
from shared.text.tokeniser import Tokeniser


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What a run of tokens added.

    Attributes:
        text: may be shown now.
        stopped: the stop string that ended the choice, or None.
        num_ids: ids of the whole choice that count so far; if stopped, up to and with the one that completed the
            stop string: the choice is this long, and every id behind it is void.
    """

    text: str
    stopped: str | None
    num_ids: int


class TextStream:
    """Detokenises one choice and looks for its stop strings.

    A deterministic function of the ids: how they are cut into pushes changes neither the text shown after k ids nor
    where it stops.

    Args:
        stop_strings: end the choice and are not shown.
        min_tokens: a stop string completed by an earlier token than this many is ordinary text.
        end_ids: tokens that end the choice by themselves and are no text (EOS, stop ids).
    """

    def __init__(
        self,
        tokeniser: Tokeniser,
        stop_strings: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        end_ids: Iterable[int] = (),
    ) -> None:
        self._detokeniser = Detokeniser(tokeniser)
        self._matcher = StopMatcher(stop_strings)
        self._min_tokens = min_tokens
        self._end_ids = frozenset(end_ids)
        self._num_ids = 0
        self._stopped: str | None = None

    @classmethod
    def of_choice(cls, tokeniser: Tokeniser, stop_strings: Sequence[str], sampling: SamplingParams) -> Self:
        """The stream of a choice that was sampled so."""
        eos_ids = () if sampling.ignore_eos else tokeniser.eos_ids
        end_ids = (*eos_ids, *sampling.stop_token_ids)
        return cls(tokeniser, stop_strings, min_tokens=sampling.min_tokens, end_ids=end_ids)

    def push(self, ids: Iterable[int]) -> TextDelta:
        """Take the next ids."""
        shown: list[str] = []
        for token_id in ids:
            if self._stopped is not None:
                break
            self._num_ids += 1
            shown.append(self._push_one(token_id))
        return TextDelta("".join(shown), self._stopped, self._num_ids)

    def finish(self) -> str:
        """The rest of the text, when no more ids come: empty if a stop string was found."""
        return "" if self._stopped is not None else self._matcher.flush() + self._detokeniser.flush()

    def _push_one(self, token_id: int) -> str:
        text = "" if token_id in self._end_ids else self._detokeniser.push((token_id,))
        delta = self._matcher.feed(text, armed=self._num_ids >= self._min_tokens)
        self._stopped = delta.stopped
        return delta.text
