"""How an answer stands when a worker is given it: its text so far, and whether it has ended already."""

from shared.blocks import TokenIds
from shared.request import FinishReason
from shared.text.stream import TextStream
from shared.text.tokeniser import Tokeniser
from shared.wire.to_worker import Assignment


def text_of(tokeniser: Tokeniser, assignment: Assignment, ids: TokenIds) -> TextStream:
    """The text of the choice up to and with `ids`, which are prompt and accepted tokens; it looks for stop strings."""
    text = TextStream.of_choice(tokeniser, assignment.stop_strings, assignment.sampling)
    text.push(ids[assignment.prompt_len :])
    return text


def end_of(tokeniser: Tokeniser, assignment: Assignment, ids: TokenIds) -> tuple[FinishReason, str | int | None] | None:
    """How the accepted tokens end the choice already, and by what; None: they do not, as ever of our own frames, in
    which a last token never stands without its end."""
    sampling, made = assignment.sampling, ids[assignment.prompt_len :]
    if not made:
        return None
    if (stop := text_of(tokeniser, assignment, ids).push(()).stopped) is not None:
        return FinishReason.STOP, stop
    if made[-1] in sampling.ends(frozenset(tokeniser.eos_ids)):
        return FinishReason.STOP, made[-1] if made[-1] in sampling.stop_token_ids else None
    return (FinishReason.LENGTH, None) if len(made) >= sampling.max_tokens else None
