"""Messages as JSON: `{"v": 1, "type": "<snake case class name>", ...fields}`.

Fields at their default are left out; unknown fields are ignored, so a field may be added with a default without a new
version. Token ids travel as base64 of little-endian int32, other bytes as base64. What two workers must agree on
before KV moves between them is not here but in `KvLayout.fingerprint`.
"""

import re
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
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


def type_name(message_class: type) -> str:
    """`PrefillWork` is `prefill_work` on the wire."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", message_class.__name__).lower()


def _is_default(field: "Field[Any]", value: object) -> bool:
    if field.default is not MISSING:
        return bool(field.default == value)
    return field.default_factory is not MISSING and bool(field.default_factory() == value)


def _to_jsonable(value: object) -> object:
    if isinstance(value, array):
        return token_ids_to_text(value)  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, bytes):
        return b64encode(value).decode("ascii")
    if is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _to_jsonable(getattr(value, field.name))
            for field in fields(value)
            if not _is_default(field, getattr(value, field.name))
        }
    if isinstance(value, tuple | list):
        return [_to_jsonable(item) for item in cast("Iterable[object]", value)]
    return value


def encode(message: Any) -> bytes:
    """The record value of a message (a dataclass of `shared.wire`)."""
    body = _to_jsonable(message)
    assert isinstance(body, dict)
    return orjson.dumps({"v": VERSION, "type": type_name(message.__class__), **body}, option=orjson.OPT_NON_STR_KEYS)


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
            first = error.errors(include_input=False, include_url=False)[0]
            raise UndecodableMessage(f"field {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
