"""Messages as JSON: `{"v": 1, "type": "<snake case class name>", ...fields}`.

Fields at their default are left out; unknown fields are ignored, so a field may be added with a default without a new
version. A named tuple travels as an array, without names. Token ids travel as base64 of little-endian int32, other
bytes as base64. What two workers must agree on before KV moves between them is not here but in `KvLayout.fingerprint`.
"""

import re
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Generic, TypeVar, cast

import orjson
from pydantic import PlainValidator, TypeAdapter, ValidationError

from shared.blocks import TokenIds, token_ids_from_text, token_ids_to_text
from shared.errors import BatonError

VERSION = 1


class UndecodableMessage(BatonError):
    """A record on a private topic that no version of ours wrote."""


def _ids_from_wire(value: object) -> TokenIds:
    if not isinstance(value, str):
        raise ValueError("token ids are base64 text")  # noqa: TRY004 - pydantic turns a ValueError into its own
    return token_ids_from_text(value)


def _bytes_from_wire(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("bytes are base64 text")  # noqa: TRY004 - as above
    return b64decode(value, validate=True)


WireIds = Annotated[TokenIds, PlainValidator(_ids_from_wire)]
"""Token ids in a message."""

WireBytes = Annotated[bytes, PlainValidator(_bytes_from_wire)]
"""Opaque bytes in a message."""


@cache
def type_name(message_class: type) -> str:
    """`PrefillWork` is `prefill_work` on the wire."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", message_class.__name__).lower()


_PLAIN = frozenset({str, int, float, bool, type(None)})


@cache
def _members(message_class: type) -> tuple[tuple[str, object], ...]:
    """Name and default of each field; MISSING where there is none."""
    return tuple((field.name, _default_of(field)) for field in fields(message_class))


def _default_of(field: "Field[Any]") -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _to_jsonable(value: object) -> object:
    kind = value.__class__
    if kind in _PLAIN:
        return value
    if issubclass(kind, tuple | list):
        return [_to_jsonable(item) for item in cast("Iterable[object]", value)]
    if kind is array:
        return token_ids_to_text(cast("TokenIds", value))
    if kind is bytes:
        return b64encode(cast("bytes", value)).decode("ascii")
    if is_dataclass(kind):
        return _members_of(value)
    return value


def _members_of(message: object) -> dict[str, object]:
    """The fields that are not at their default."""
    members: dict[str, object] = {}
    for name, default in _members(message.__class__):
        member = getattr(message, name)
        if member != default:
            members[name] = member if member.__class__ in _PLAIN else _to_jsonable(member)
    return members


def encode(message: Any) -> bytes:
    """The record value of a message (a dataclass of `shared.wire`)."""
    body = {"v": VERSION, "type": type_name(message.__class__), **_members_of(message)}
    return orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS)


def first_problem(error: ValidationError) -> str:
    """The field that is wrong, and how, without its value."""
    first = error.errors(include_input=False, include_url=False)[0]
    return f"field {'.'.join(map(str, first['loc']))}: {first['msg']}"


M = TypeVar("M")


class Decoder(Generic[M]):
    """Turns record values into the messages that one receiver may get."""

    def __init__(self, *message_classes: type[M]) -> None:
        self._adapters = {type_name(message_class): TypeAdapter(message_class) for message_class in message_classes}

    def decode(self, value: bytes) -> M:
        """The message in `value`. Raises UndecodableMessage, naming the field that is wrong."""
        try:
            body = orjson.loads(value)
            return self._adapters[body["type"]].validate_python(body)
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise UndecodableMessage(f"no message of this topic: {error!r}") from error
        except ValidationError as error:
            raise UndecodableMessage(first_problem(error)) from error
