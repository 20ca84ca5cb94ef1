"""Frame entries as workers make them."""

from shared.blocks import token_ids
from shared.engine.port import TokenOutput
from shared.request import Event, FinishReason, Stamps
from shared.wire.to_stream_out import ErrorBody, FrameEntry
from shared.wire.to_worker import Assignment
from shared.wire.wire_format import WireFormat


def token_entry(
    assignment: Assignment,
    token: TokenOutput,
    *,
    stop: str | None,
    stamps: Stamps,
    wire_format: WireFormat = WireFormat.NATIVE,
) -> FrameEntry:
    """The entry of one token; `stop` is the stop string that it completed, if any."""
    if token.finish is FinishReason.FAILED:
        return failed_entry(assignment, token.index, token.error or "the engine made no token", stamps)
    finish = FinishReason.STOP if stop is not None else token.finish
    return FrameEntry(
        request_id=assignment.request_id,
        choice=assignment.choice,
        placement=assignment.placement,
        index=token.index,
        ids=token_ids((token.token_id,)),
        logprobs=(token.logprob,) if token.logprob else (),
        finish=finish,
        stop_reason=stop if stop is not None else _stop_token(assignment, token),
        num_cached_tokens=token.num_cached_tokens,
        wire_format=wire_format,
        stamps=stamps,
    )


def failed_entry(assignment: Assignment, index: int, reason: str, stamps: Stamps | None = None) -> FrameEntry:
    """Ends the choice as failed; `index` is that of the token that could not be made."""
    return FrameEntry(
        request_id=assignment.request_id,
        choice=assignment.choice,
        placement=assignment.placement,
        index=index,
        ids=token_ids(()),
        finish=FinishReason.FAILED,
        error=ErrorBody(message=reason, type="server_error", http_status=500, code="generation_failed"),
        stamps=stamps or {},
    )


def end_entry(assignment: Assignment, index: int, finish: FinishReason, stop_reason: str | int | None) -> FrameEntry:
    """Ends the choice behind its first `index` tokens, without another one."""
    return FrameEntry(
        request_id=assignment.request_id,
        choice=assignment.choice,
        placement=assignment.placement,
        index=index,
        ids=token_ids(()),
        finish=finish,
        stop_reason=stop_reason,
    )


def finished_stamps(stamps: Stamps, now_s: float) -> Stamps:
    """`stamps` with the end of the choice."""
    return {**stamps, Event.FINISHED: now_s}


def _stop_token(assignment: Assignment, token: TokenOutput) -> int | None:
    stopped_by_id = token.finish is FinishReason.STOP and token.token_id in assignment.sampling.stop_token_ids
    return token.token_id if stopped_by_id else None
