"""Draws what the other modules of this folder worked out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import log10

from markupsafe import Markup

from loadgen.measure import Record, Summary
from loadgen.page.latency import Distribution, HandOff
from loadgen.page.slo import SloGrid
from loadgen.page.stages import Life, Waterfall
from loadgen.page.svg import Drawing, Plot, Point, Scale, log_bounds
from loadgen.page.timeline import Flow, LatencyBin, Timeline
from loadgen.page.wording import figures, ms_text, percent_text, seconds_text, short

WIDE, HALF, THIRD = 1080.0, 520.0, 344.0
LEFT, RIGHT = 52.0, 12.0
CROSS = 3.0

MAX_TIMELINE_HEIGHT = 620.0
MAX_BAR_HEIGHT = 13.0

TAIL_SHARES = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999)


def timeline_chart(timeline: Timeline) -> Markup:
    """A bar for each request, or latencies over the time of arrival."""
    return _bars_chart(timeline) if timeline.bars or not timeline.bins else _bins_chart(timeline)


def _bars_chart(timeline: Timeline) -> Markup:
    step = min(MAX_BAR_HEIGHT, MAX_TIMELINE_HEIGHT / max(len(timeline.bars), 1))
    height = max(step * len(timeline.bars), 40.0)
    drawing = Drawing(WIDE, height + 58, "Requests over time")
    x = Scale(0, timeline.end_s, LEFT, WIDE - RIGHT)
    plot = Plot(drawing, x, Scale(0, len(timeline.bars) or 1, 22 + height, 22))
    plot.x_axis(x.ticks(12), short, "seconds after the start")
    drawing.text(LEFT, 13, "one line a request, the first at the top", "axis-title")
    thickness = max(step - 2, step * 0.7)
    for place, bar in enumerate(timeline.bars):
        record, top = bar.record, 22 + place * step
        words = _request_words(record, bar.ended_s)
        style_of_end = "k k-stream" if record.completed else "k k-broken"
        moments = (record.row.at_s, record.sent_s, record.first_token_s, bar.ended_s)
        for from_s, to_s, style in _pieces(moments, style_of_end, completed=record.completed):
            drawing.rect(x(from_s), top, x(to_s) - x(from_s), thickness, style, title=words)
        if not record.completed:
            reach = min(CROSS, thickness)
            drawing.cross(min(x(bar.ended_s) + 2, x.end), top + thickness / 2, reach, "cross", title=words)
    for place in _number_ticks(len(timeline.bars), step):
        drawing.text(LEFT - 6, 22 + (place + 0.5) * step + 3, str(place), "tick", "end")
    return drawing.markup()


def _pieces(
    moments: tuple[float, float | None, float | None, float], style_of_end: str, *, completed: bool
) -> list[tuple[float, float, str]]:
    at_s, sent_s, first_s, ended_s = moments
    if sent_s is None:
        return []
    late = (at_s, sent_s, "k k-late")
    if first_s is None:
        return [late, (sent_s, ended_s, "k k-wait" if completed else "k k-broken")]
    return [late, (sent_s, first_s, "k k-wait"), (first_s, ended_s, style_of_end)]


def _request_words(record: Record, ended_s: float) -> str:
    words = [f"#{record.row.row}", f"{record.row.input_tokens} → {record.row.output_tokens} tokens"]
    words.append("never sent" if record.sent_s is None else f"sent at {record.sent_s:.2f} s")
    if record.ttft_s is not None:
        words.append(f"first token after {seconds_text(record.ttft_s)}")
    if record.sent_s is not None:
        words.append(f"{'done' if record.completed else record.bucket} after {seconds_text(ended_s - record.row.at_s)}")
    return ", ".join(words)


def _number_ticks(count: int, step: float) -> list[int]:
    stride = next(stride for stride in (1, 2, 5, 10, 20, 50, 100, 200) if stride * step >= 22 or stride == 200)
    return list(range(0, count, stride))


def _bins_chart(timeline: Timeline) -> Markup:
    drawing = Drawing(WIDE, 300, "Latency over the time of arrival")
    curves = {
        f"{style}{dashes}": [
            ((entry.from_s + entry.to_s) / 2, summary.percentiles[percent])
            for entry in timeline.bins
            if (summary := of_bin(entry)) is not None
        ]
        for style, of_bin in _BIN_QUANTITIES.items()
        for percent, dashes in ((50, ""), (99, " dashed"))
    }
    x = Scale(0, timeline.end_s, LEFT, WIDE - RIGHT)
    bounds = log_bounds(value for points in curves.values() for _, value in points)
    plot = Plot(drawing, x, Scale(*bounds, 250, 24, is_log=True))
    plot.x_axis(x.ticks(12), short, "seconds after the start, by intended time")
    plot.y_axis(plot.y.ticks(5), _tick_text, "median (line) and p99 (dashes) of the requests that came then")
    for style, points in curves.items():
        plot.line(points, style)
    for entry in timeline.bins:
        if entry.failed:
            words = f"{entry.failed} of {entry.requests} requests from {entry.from_s:g} to {entry.to_s:g} s failed"
            drawing.cross(x((entry.from_s + entry.to_s) / 2), 242, CROSS + 1, "cross", title=words)
    return drawing.markup()


_BIN_QUANTITIES: Mapping[str, Callable[[LatencyBin], Summary | None]] = {
    "c-ttft": lambda entry: entry.ttft,
    "c-e2el": lambda entry: entry.e2el,
}


def flow_chart(flow: Flow, end_s: float) -> Markup:
    """Requests in flight, arrivals and tokens a second, one below the other."""
    panels: tuple[tuple[str, Sequence[float], str], ...] = (
        ("requests in flight (most in each bin)", flow.in_flight, "k k-wait"),
        ("arrivals a second, by intended time", flow.arrivals_per_s, "k k-late"),
        ("answer tokens a second", flow.tokens_per_s, "k k-stream"),
    )
    panel_height, gap = 74.0, 30.0
    drawing = Drawing(WIDE, len(panels) * (panel_height + gap) + 24, "Load over time")
    for number, (title, heights, style) in enumerate(panels):
        top = 22 + number * (panel_height + gap)
        x = Scale(0, end_s, LEFT, WIDE - RIGHT)
        y = Scale(0, max(heights, default=0.0) * 1.05 or 1.0, top + panel_height, top)
        plot = Plot(drawing, x, y)
        is_last = number == len(panels) - 1
        plot.x_axis(x.ticks(12), short if is_last else _nothing, "seconds after the start" if is_last else "")
        plot.y_axis(y.ticks(3), short, title)
        plot.columns(heights, flow.bin_s, style, _bin_words(heights, flow.bin_s))
    return drawing.markup()


def _bin_words(heights: Sequence[float], bin_s: float) -> Callable[[int], str]:
    return lambda place: f"{place * bin_s:g} to {(place + 1) * bin_s:g} s: {figures(heights[place])}"


def _nothing(_: float) -> str:
    return ""


def tail_chart(found: Distribution, style: str) -> Markup:
    """Share of values below each value, the tail stretched."""
    return _tails_chart([(found, style)], THIRD, 210, found.name)


def hand_off_chart(hand_off: HandOff) -> Markup:
    """The gap behind token 1 and all later gaps, as curves."""
    return _tails_chart([(hand_off.later, "c-itl"), (hand_off.first, "c-handoff")], HALF, 260, "Hand-off gap")


def _tails_chart(curves: Sequence[tuple[Distribution, str]], width: float, height: float, label: str) -> Markup:
    drawing = Drawing(width, height, f"{label}: share of values below")
    points = [point for found, _ in curves for point in found.points]
    limits = [found.limit_s for found, _ in curves if found.limit_s is not None]
    x = Scale(*log_bounds([*(value for value, _ in points), *limits]), LEFT, width - RIGHT, is_log=True)
    deepest = max((depth_of(share) for _, share in points), default=1.0)
    shares = [share for share in TAIL_SHARES if depth_of(share) <= max(deepest, 1.0) + 0.05]
    plot = Plot(drawing, x, Scale(0, max(deepest, 1.0) + 0.05, height - 36, 12))
    plot.x_axis(_spaced(x, x.ticks(6), 46), _tick_text, "")
    for share in shares:
        at = plot.y(depth_of(share))
        drawing.line(x.start, at, x.end, at, "grid")
        if share:
            drawing.text(x.start - 6, at + 4, f"p{share * 100:g}", "tick", "end")
    for found, style in curves:
        if found.limit_s is not None:
            plot.limit(found.limit_s, f"limit {seconds_text(found.limit_s)}")
        steps = _steps([(value, depth_of(share)) for value, share in found.points])
        plot.line(steps, style)
        # Each line's largest value as a dot: what a single request can meet.
        for value, share in found.points[-1:]:
            words = f"largest {seconds_text(found.max_s)}"
            drawing.circle(x(value), plot.y(depth_of(share)), 3, f"dot {style}", title=words)
    return drawing.markup()


def depth_of(share: float) -> float:
    """0 for nothing below, 1 for 90% below, 2 for 99%: each step a tenth of the rest."""
    return -log10(1 - share)


def _steps(points: Sequence[Point]) -> list[Point]:
    if not points:
        return []
    path = [(points[0][0], 0.0), points[0]]
    for value, depth in points[1:]:
        path += [(value, path[-1][1]), (value, depth)]
    return path


def _spaced(scale: Scale, ticks: Iterable[float], least: float) -> list[float]:
    kept: list[float] = []
    for tick in ticks:
        if not kept or scale(tick) - scale(kept[-1]) >= least:
            kept.append(tick)
    return kept


def _tick_text(value_s: float) -> str:
    return f"{short(value_s)} s" if value_s >= 1 else f"{short(round(value_s * 1e3, 6))} ms"


def gap_places_chart(hand_off: HandOff) -> Markup:
    """Median and p90 of gaps by their place in the answer."""
    drawing = Drawing(HALF, 260, "Gaps by their place in the answer")
    places = hand_off.places
    highest = max((entry.summary.percentiles[90] for entry in places), default=1.0) * 1.05 or 1.0
    x = Scale(0.5, max(len(places), 8) + 0.5, LEFT + 12, HALF - RIGHT)
    plot = Plot(drawing, x, Scale(0, highest * 1e3, 224, 24))
    plot.y_axis(plot.y.ticks(5), short, "ms: median (bar), p90 (line)")
    for entry in places:
        left, right = x(entry.place - 0.5), x(entry.place + 0.5)
        summary = entry.summary
        top = plot.y(summary.median * 1e3)
        words = (
            f"token {entry.place} to {entry.place + 1}: median {seconds_text(summary.median)}, "
            f"p90 {seconds_text(summary.percentiles[90])}, {summary.count} answers"
        )
        style = "k k-handoff" if entry.place == 1 else "k k-itl"
        drawing.rect(left + 1, top, right - left - 2, plot.y.start - top, style, title=words)
        tail, middle = plot.y(summary.percentiles[90] * 1e3), (left + right) / 2
        drawing.line(middle, top, middle, tail, "whisker")
        drawing.line(middle - 3, tail, middle + 3, tail, "whisker")
        if entry.place == 1 or entry.place % 5 == 0:
            drawing.text(middle, 238, f"{entry.place}→{entry.place + 1}", "tick", "middle")
    drawing.line(x.start, plot.y.start, x.end, plot.y.start, "axis")
    drawing.text(x.end, 254, "place of the gap in the answer", "axis-title", "end")
    return drawing.markup()


def waterfall_chart(waterfall: Waterfall, label: str) -> Markup:
    """The median request and the slowest, stage by stage."""
    row_height, names_width, totals_width = 27.0, 224.0, 62.0
    height = row_height * len(waterfall.lives)
    drawing = Drawing(WIDE, height + 42, label)
    longest_s = max((_end_s(life) for life in waterfall.lives), default=1.0) or 1.0
    x = Scale(0, longest_s, names_width, WIDE - totals_width)
    plot = Plot(drawing, x, Scale(0, 1, height + 6, 4))
    plot.x_axis(x.ticks(10), short, "seconds after the intended time")
    for number, life in enumerate(waterfall.lives):
        top, record = 6 + number * row_height, life.record
        name = f"#{record.row.row} (median)" if life.is_median else f"#{record.row.row}"
        sizes = f"{record.row.input_tokens} → {record.output_tokens} tokens"
        drawing.text(0, top + 16, name, "row-name strong" if life.is_median else "row-name")
        drawing.text(names_width - 10, top + 16, sizes, "tick", "end")
        for segment in life.segments:
            words = f"{segment.name}: {seconds_text(segment.to_s - segment.from_s)} ({segment.meaning})"
            left, right = x(segment.from_s), x(segment.to_s)
            drawing.rect(left, top + 3, right - left, row_height - 8, f"k k-{segment.kind}", title=words)
        drawing.text(x(_end_s(life)) + 6, top + 16, seconds_text(life.total_s), "row-total")
    return drawing.markup()


def _end_s(life: Life) -> float:
    return max((segment.to_s for segment in life.segments), default=life.total_s)


def slo_chart(grid: SloGrid) -> Markup:
    """Attainment as a field of cells: TTFT limits to the right, TPOT limits upwards."""
    columns, rows = len(grid.ttft_limits_ms), len(grid.tpot_limits_ms)
    left, cell_width, cell_height = 74.0, min(60.0, 440.0 / columns), 28.0
    bottom = 24 + rows * cell_height
    drawing = Drawing(HALF, bottom + 40, "SLO attainment over TTFT and TPOT limits")
    drawing.text(0, 12, "TPOT limit", "axis-title")
    for row, (tpot_ms, shares) in enumerate(zip(grid.tpot_limits_ms, grid.shares, strict=True)):
        top = bottom - (row + 1) * cell_height
        is_given = grid.given is not None and tpot_ms == grid.given[1]
        drawing.text(left - 8, top + 18, _limit_text(tpot_ms), "tick strong" if is_given else "tick", "end")
        for column, (ttft_ms, share) in enumerate(zip(grid.ttft_limits_ms, shares, strict=True)):
            x = left + column * cell_width
            words = f"TTFT {_limit_words(ttft_ms)}, TPOT {_limit_words(tpot_ms)}: {percent_text(share)} of all requests"
            drawing.rect(x, top, cell_width - 2, cell_height - 2, "cell-floor")
            opacity = f"{share:.2f}"
            style = "cell given" if grid.given == (ttft_ms, tpot_ms) else "cell"
            drawing.rect(x, top, cell_width - 2, cell_height - 2, style, title=words, **{"fill-opacity": opacity})
            text_style = "cell-text strong-cell" if share > 0.8 else "cell-text"
            drawing.text(x + cell_width / 2 - 1, top + 18, f"{share * 100:.0f}", text_style, "middle")
    for column, ttft_ms in enumerate(grid.ttft_limits_ms):
        is_given = grid.given is not None and ttft_ms == grid.given[0]
        style = "tick strong" if is_given else "tick"
        drawing.text(left + (column + 0.5) * cell_width - 1, bottom + 14, _limit_text(ttft_ms), style, "middle")
    drawing.text(left + columns * cell_width, bottom + 31, "TTFT limit", "axis-title", "end")
    return drawing.markup()


def _limit_text(limit_ms: float | None) -> str:
    if limit_ms is None:
        return "any"
    return f"{limit_ms / 1e3:g} s" if limit_ms >= 1000 else f"{limit_ms:g} ms"


def _limit_words(limit_ms: float | None) -> str:
    return "of any length" if limit_ms is None else f"≤ {ms_text(limit_ms)}"
