"""Reads request traces: when each request came and how long its prompt and answer were."""

import csv
import json
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from shared.errors import StartupError

MOONCAKE_BLOCK_TOKENS = 512
"""Prompt tokens that one hash id of a Mooncake trace stands for."""

AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace.

    Attributes:
        index: its place in the file, from 0. Names a prompt that has no hash ids, whatever slice is replayed.
        at_s: seconds since the trace's first request.
        input_tokens, output_tokens: lengths of prompt and answer.
        hash_ids: one id per block of the prompt; equal ids mean equal prompts up to that block's end. Empty where
            the trace says nothing of sharing.
    """

    index: int
    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path) -> list[TraceRow]:
    """Rows of a Mooncake jsonl or an Azure csv file, told apart by their first line.

    Raises StartupError for a file that cannot be read, is neither, or has a bad line (which it names).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"cannot read the trace {path}: {error}") from error
    first_line = text.partition("\n")[0].strip()
    if first_line.startswith("{"):
        rows = _read_mooncake(path, text)
    elif first_line.split(",") == AZURE_HEADER:
        rows = _read_azure(path, text)
    else:
        raise StartupError(
            f"{path} is no trace that is known here: its first line is neither a JSON object (Mooncake) "
            f"nor {','.join(AZURE_HEADER)} (Azure)"
        )
    for earlier, later in pairwise(rows):
        if later.at_s < earlier.at_s:
            raise StartupError(f"{path}: request {later.index} lies before the one above it; sort the trace by time")
    return rows


def _read_mooncake(path: Path, text: str) -> list[TraceRow]:
    rows: list[TraceRow] = []
    start_ms: float | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields: dict[str, Any] = json.loads(line)
            timestamp_ms = float(fields["timestamp"])
            start_ms = timestamp_ms if start_ms is None else start_ms
            row = TraceRow(
                index=len(rows),
                at_s=(timestamp_ms - start_ms) / 1000,
                input_tokens=_length(fields["input_length"]),
                output_tokens=_length(fields["output_length"]),
                hash_ids=tuple(int(hash_id) for hash_id in fields.get("hash_ids", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StartupError(f"{path}, line {number}: {_reason(error)}") from error
        num_blocks = -(-row.input_tokens // MOONCAKE_BLOCK_TOKENS)
        if row.hash_ids and len(row.hash_ids) != num_blocks:
            raise StartupError(
                f"{path}, line {number}: {len(row.hash_ids)} hash_ids for {row.input_tokens} tokens; "
                f"blocks of {MOONCAKE_BLOCK_TOKENS} make {num_blocks}"
            )
        rows.append(row)
    return rows


def _read_azure(path: Path, text: str) -> list[TraceRow]:
    rows: list[TraceRow] = []
    start: datetime | None = None
    for number, fields in enumerate(csv.reader(text.splitlines()), start=1):
        if number == 1 or not fields:
            continue
        try:
            timestamp, input_tokens, output_tokens = fields
            # Seven digits of a second; what lies below a microsecond is cut off.
            moment = datetime.fromisoformat(timestamp)
            start = moment if start is None else start
            row = TraceRow(
                index=len(rows),
                at_s=(moment - start).total_seconds(),
                input_tokens=_length(input_tokens),
                output_tokens=_length(output_tokens),
            )
        except (TypeError, ValueError) as error:
            raise StartupError(f"{path}, line {number}: {_reason(error)}") from error
        rows.append(row)
    return rows


def _length(value: str | int) -> int:
    length = int(value)
    if length < 0:
        raise ValueError(f"a length of {length} tokens")
    return length


def _reason(error: Exception) -> str:
    return f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)
