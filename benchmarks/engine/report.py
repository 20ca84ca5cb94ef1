"""Rows as tables for people."""

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.engine.peer import BOUNDS, Peer
from benchmarks.engine.rows import Row

HEADER = ("", "Baton", "full steps", "device", "vLLM 0.26", "limit", "aim", "")


def table(rows: Iterable[Row], peers: Mapping[str, Peer]) -> str:
    """A Markdown table of rows beside their peer's and what was aimed at."""
    return markdown(HEADER, [_cells(row, peers.get(row.name)) for row in rows])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns line up."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def kernel_table(rows: Iterable[Row]) -> str:
    """The most expensive kernels of every row that was profiled."""
    parts: list[str] = []
    for row in rows:
        if row.profile is not None:
            parts.append(f"{row.name}: {row.profile.step_ms:.3f} ms, {row.profile.busy_ms:.3f} of it in kernels")
            parts += [f"  {ms:9.4f} ms {calls:7.1f} × {name[:100]}" for name, calls, ms in row.profile.kernels]
    return "\n".join(parts)


def verdict(row: Row, peer: Peer | None) -> str:
    """How a row stands."""
    if row.name in BOUNDS:
        return "ok" if row.value <= BOUNDS[row.name] else "MISSED"
    if peer is None:
        return ""
    if _is_worse(row, peer.vllm):
        return "BEHIND vLLM"
    return "aim missed" if _is_worse(row, peer.aim) else "ok"


def number(value: float | None, unit: str = "") -> str:
    """Three digits or more."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{text} {unit}".rstrip()


def _cells(row: Row, peer: Peer | None) -> tuple[str, ...]:
    peer = peer or Peer(None, None, BOUNDS.get(row.name))
    return (
        row.name,
        number(row.value, row.unit),
        number(row.steady_ms, "ms") if row.steady_ms else "",
        number(row.profile.step_ms, "ms") if row.profile else "",
        number(peer.vllm),
        number(peer.limit),
        number(peer.aim),
        verdict(row, peer),
    )


def _is_worse(row: Row, other: float | None) -> bool:
    if other is None:
        return False
    return row.value < other if row.unit == "tok/s" else row.value > other
