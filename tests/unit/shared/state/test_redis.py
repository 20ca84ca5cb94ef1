"""What an asking of Redis makes of errors that no server can be made to answer with."""

import re

import pytest
from redis._parsers.base import BaseParser

from shared.state import redis
from shared.state.port import StateUnavailable
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


NOT_NOW = (
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
    "LOADING Redis is loading the dataset in memory",
    "READONLY You can't write against a read only replica.",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "CLUSTERDOWN The cluster is down",
    "NOREPLICAS Not enough good replicas to write.",
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "OOM command not allowed when used memory > 'maxmemory'. script: 4b1d, on @user_script:9.",
)


def answered(words):
    """The error that the client raises for an answer."""
    return BaseParser.parse_error(words)


@pytest.mark.parametrize("words", NOT_NOW)
async def test_a_server_that_cannot_serve_for_now_is_asked_again(words):
    assert await _until_answered(failing_once(answered(words))) == "answer"


@pytest.mark.parametrize("words", NOT_NOW)
async def test_a_server_that_cannot_serve_for_long_is_unavailable_and_says_why(words, monkeypatch):
    monkeypatch.setattr(redis, "CALL_TIMEOUT_S", 0.01)

    async def refused():
        raise answered(words)

    with pytest.raises(StateUnavailable, match=re.escape(words.split()[3])):
        await _until_answered(refused)


@pytest.mark.parametrize("words", ["ERR unknown command 'BANANA'", "WRONGTYPE Operation against a key"])
async def test_answers_that_tell_of_a_defect_are_no_absence(words):
    with pytest.raises(redis.ResponseError):
        await _until_answered(failing_once(answered(words)))
