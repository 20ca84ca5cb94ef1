"""Seats: what the device knows of each running sequence, one record of 32-bit words a seat."""

from enum import IntEnum


class Word(IntEnum):
    """Places of the words in a seat's record; temperature, min-p, top-p and penalties are float32 bits.

    Attributes:
        POSITION: of the next token to compute; -1 in a seat that nobody holds.
        TOKEN: the id at that position.
        TOP_K: 0 keeps all.
        KEY_LOW, KEY_HIGH: halves of the 64-bit random stream after seed and choice; the token index comes last.
        NUM_LOGPROBS: likeliest tokens to report beside the drawn one; -1 where no log probability is wanted.
        NUM_ENDS: ids from FIRST_END on that may not be drawn as one of the first MIN_TOKENS tokens of the answer.
    """

    POSITION = 0
    TOKEN = 1
    PROMPT_LEN = 2
    MIN_TOKENS = 3
    TEMPERATURE = 4
    TOP_K = 5
    TOP_P = 6
    MIN_P = 7
    REPETITION_PENALTY = 8
    PRESENCE_PENALTY = 9
    FREQUENCY_PENALTY = 10
    KEY_LOW = 11
    KEY_HIGH = 12
    NUM_LOGPROBS = 13
    NUM_ENDS = 14


FIRST_END = 16
MAX_ENDS = 80
FIRST_PAGE = FIRST_END + MAX_ENDS
