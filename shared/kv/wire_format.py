"""In what form KV pages travel."""

from shared.wire.wire_format import WireFormat as WireFormat
