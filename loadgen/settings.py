"""Reads the command line's compound options."""

from collections.abc import Iterable
from math import isfinite

from loadgen.measure import Slo
from shared.errors import StartupError

SLO_NAMES = ("ttft", "tpot", "e2el")


def parse_goodput(texts: Iterable[str]) -> Slo:
    """`ttft:500 tpot:50 e2el:2000`, limits in milliseconds, in one text or several."""
    limits: dict[str, float] = {}
    for part in " ".join(texts).replace(",", " ").split():
        name, _, value = part.partition(":")
        if name not in SLO_NAMES:
            raise StartupError(f"--goodput {part}: the name is one of {', '.join(SLO_NAMES)}, as in ttft:500")
        limits[f"{name}_ms"] = _number(f"--goodput {part}", value)
        if limits[f"{name}_ms"] <= 0:
            raise StartupError(f"--goodput {part}: a limit is above 0 ms")
    return Slo(**limits)


def parse_pairs(option: str, pairs: Iterable[str]) -> dict[str, str]:
    """`K=V` options as a mapping."""
    parsed: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise StartupError(f"{option} {pair}: write it as NAME=VALUE")
        parsed[name] = value
    return parsed


def parse_rows(text: str | None) -> tuple[int, int | None] | None:
    """`A:B` as a half-open slice of rows; either side may be left out."""
    bounds = _bounds("--rows", text)
    if bounds is None:
        return None
    first, last = bounds
    if first != int(first) or (last is not None and last != int(last)):
        raise StartupError(f"--rows {text}: rows are whole numbers")
    return int(first), None if last is None else int(last)


def parse_window(text: str | None) -> tuple[float, float | None] | None:
    """`A:B` as a half-open slice of the trace's seconds; either side may be left out."""
    return _bounds("--window", text)


def _bounds(option: str, text: str | None) -> tuple[float, float | None] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not colon:
        raise StartupError(f"{option} {text}: write it as FIRST:END")
    start = _number(f"{option} {text}", first) if first else 0.0
    end = _number(f"{option} {text}", last) if last else None
    if start < 0 or (end is not None and end <= start):
        raise StartupError(f"{option} {text}: FIRST is at least 0 and END lies behind it")
    return start, end


def _number(option: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise StartupError(f"{option}: {text!r} is no number") from None
    if not isfinite(number):
        raise StartupError(f"{option}: {text!r} is no finite number")
    return number
