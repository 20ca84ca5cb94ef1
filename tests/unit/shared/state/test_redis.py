"""What an asking of Redis makes of errors that no server can be made to answer with."""

import pytest

from shared.state.redis import _until_answered


def failing_once(error):
    errors = [error]

    async def command():
        if errors:
            raise errors.pop()
        return "answer"

    return command


async def test_connection_that_was_reset_before_its_first_write_is_made_again():
    error = RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")
    assert await _until_answered(failing_once(error)) == "answer"


async def test_other_runtime_errors_are_ours():
    with pytest.raises(RuntimeError, match="ours"):
        await _until_answered(failing_once(RuntimeError("ours")))
