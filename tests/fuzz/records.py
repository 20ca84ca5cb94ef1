"""Strategies for records that nobody of ours would write."""

import copy
import json
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

NUM_EXAMPLES = int(os.environ.get("BATON_FUZZ_EXAMPLES", "60"))
"""Examples of each fuzz; more on demand."""

FUZZ = settings(
    max_examples=NUM_EXAMPLES,
    derandomize="BATON_FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

HOSTILE_NUMBERS = [0, -1, 1, 2**31, -(2**31), 2**63 - 1, 2**64, 10**30, -(10**30), 0.5, 1e308, -1e308, 5e-324]
HOSTILE_TEXTS = [
    "",
    " ",
    "\x00",
    "a" * 5000,
    "../../etc/passwd",
    "{{ 7 * 7 }}",
    "\u202e\ud7ff\U0010ffff",
    "nan",
    "AAAA",
    "====",
    "AAAAgA==",
    "//////////8=",
    "req-1",
    "-1",
    "1e999",
]

scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(HOSTILE_NUMBERS)
    | st.integers(-5, 70_000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(HOSTILE_TEXTS)
    | st.text(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)

BROKEN = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"[" * 5000,
    b'{"a":' * 3000 + b"1" + b"}" * 3000,
    b'{"v": NaN}',
    b'{"v": 1e999}',
    b'{"v": "\\ud800"}',
    b'{"v": "\xff\xfe"}',
    b"\x00" * 100,
    b"\xef\xbb\xbf{}",
    b'{"v": 1, "type": []}',
    b'{"v": 1, "type": {}}',
    b'{"v": 1, "type": "stop"}',
    b"9" * 5000,
]

garbage = st.sampled_from(BROKEN) | st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode())


@st.composite
def mutated(draw: st.DrawFn, bases: list[dict[str, Any]]) -> dict[str, Any]:
    """A right message with up to three places of it replaced, dropped or doubled."""
    message = copy.deepcopy(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(0, 3))):
        parent, key = draw(st.sampled_from(list(_places(message))))
        match draw(st.sampled_from(["replace", "replace", "replace", "drop", "add"])):
            case "replace":
                parent[key] = draw(values)
            case "drop":
                del parent[key]
            case "add" if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[key]))
            case "add":
                parent[draw(st.sampled_from(["x", "", "v"]))] = draw(values)
        if not list(_places(message)):
            break
    return message


def _places(value: Any) -> Any:
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in list(members):
        yield value, key
        yield from _places(member)


def as_bytes(message: Any) -> bytes:
    return json.dumps(message).encode()


def hostile(bases: list[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    """Mostly nearly right messages, some garbage, some right ones that are cut short."""
    nearly = mutated(bases).map(as_bytes)
    return st.one_of(nearly, nearly, nearly, garbage, nearly.map(lambda value: value[: len(value) // 2]))
