"""How numbers are written on the page."""

from math import floor, log10

MINUTE_S = 60.0


def seconds_text(value_s: float) -> str:
    """Three figures in the unit that suits: `0.82 ms`, `348 ms`, `1.49 s`, `4 min 10 s`."""
    if abs(value_s) >= 5 * MINUTE_S:
        minutes, seconds = divmod(round(abs(value_s)), 60)
        return f"{'−' if value_s < 0 else ''}{minutes} min {seconds} s"
    if abs(value_s) >= 0.9995:
        return f"{figures(value_s)} s"
    return f"{figures(value_s * 1e3)} ms"


def ms_text(value_ms: float) -> str:
    """As `seconds_text`, from milliseconds."""
    return seconds_text(value_ms / 1e3)


def figures(value: float) -> str:
    """Three figures, no exponent; below a hundredth `0` or two decimals."""
    if value == 0:
        return "0"
    value = float(f"{value:.3g}")
    decimals = max(0, min(2, 2 - floor(log10(abs(value)))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def short(value: float) -> str:
    """For a tick: no zeros behind the point, thousands as k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,g}k"
    return f"{value:g}"


def percent_text(share: float) -> str:
    """One decimal, but 100% only for all and 0% only for none."""
    if share in (0, 1):
        return f"{share:.0%}"
    return f"{min(max(share, 0.001), 0.999):.1%}"


def counted(count: int, noun: str) -> str:
    """`1 request`, `2 requests`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
