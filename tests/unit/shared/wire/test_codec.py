"""What stands in a record."""

from array import array
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import orjson

from shared.blocks import token_ids_to_text
from shared.wire.codec import VERSION, encode


class Colour(StrEnum):
    RED = "red"


class Size(IntEnum):
    LARGE = 3


@dataclass(frozen=True, slots=True)
class Inner:
    name: str
    number: int = 0


@dataclass(frozen=True, slots=True)
class ManyThings:
    text: str
    flag: bool = False
    number: float = 1.0
    ids: array = field(default_factory=lambda: array("i"))
    data: bytes = b""
    inner: Inner | None = None
    inners: tuple[Inner, ...] = ()
    colour: Colour | None = None
    sizes: tuple[Size, ...] = ()
    times: dict[Colour, float] = field(default_factory=dict)


def body(message):
    decoded = orjson.loads(encode(message))
    assert (decoded.pop("v"), decoded.pop("type")) == (VERSION, "many_things")
    return decoded


def test_what_is_at_its_default_is_left_out_and_what_has_none_is_not():
    assert body(ManyThings("")) == {"text": ""}
    assert body(ManyThings("x", ids=array("i"), inners=(), times={}, number=1)) == {"text": "x"}


def test_what_is_not_at_its_default_is_written():
    ids = array("i", [1, 70_000])
    message = ManyThings(
        "x", True, 0, ids, b"\x00\xff", Inner("a"), (Inner("b", 2),), Colour.RED, (Size.LARGE,), {Colour.RED: 1.5}
    )
    assert body(message) == {
        "text": "x",
        "flag": True,
        "number": 0,
        "ids": token_ids_to_text(ids),
        "data": "AP8=",
        "inner": {"name": "a"},
        "inners": [{"name": "b", "number": 2}],
        "colour": "red",
        "sizes": [3],
        "times": {"red": 1.5},
    }


def test_a_default_that_is_made_anew_for_each_message_is_not_shared():
    first = ManyThings("x")
    first.ids.append(7)
    assert body(first) == {"text": "x", "ids": token_ids_to_text(array("i", [7]))}
    assert body(ManyThings("x")) == {"text": "x"}
