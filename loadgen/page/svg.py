"""Pictures as SVG: scales, ticks and a drawing with axes. Colours are the style sheet's, by class."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Literal
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]

TICK_STEPS = (1.0, 2.0, 5.0)
TICK_LENGTH = 4.0
LEAST_ON_LOG = 1e-9
"""Where a log axis may begin: nothing here is measured more finely than to a nanosecond."""

LOG_STEPS = ((0.9, (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)), (2.2, TICK_STEPS))
"""Up to how many decades a log axis has ticks at which steps; over more it has them at powers of ten only."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values from `lowest` to `highest` onto the picture's `start` to `end`; values outside stay outside."""

    lowest: float
    highest: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        lowest, highest = self.lowest, self.highest
        if self.is_log:
            value, lowest, highest = log10(max(value, self.lowest / 10)), log10(lowest), log10(highest)
        return self.start + (value - lowest) / (highest - lowest) * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        """At most about `wanted` round values from `lowest` to `highest`."""
        return log_ticks(self.lowest, self.highest) if self.is_log else linear_ticks(self.lowest, self.highest, wanted)


def linear_ticks(lowest: float, highest: float, wanted: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    step = round_up((highest - lowest) / wanted)
    return [round(place * step, 12) for place in range(ceil(lowest / step - 1e-9), floor(highest / step + 1e-9) + 1)]


def log_ticks(lowest: float, highest: float) -> list[float]:
    """Powers of ten, over few decades also multiples of those."""
    decades = log10(highest / lowest)
    steps = next((steps for most, steps in LOG_STEPS if decades <= most), (1.0,))
    powers = range(floor(log10(lowest)), ceil(log10(highest)) + 1)
    ticks = [float(f"{step}e{power}") for power in powers for step in steps]
    return [tick for tick in ticks if lowest * (1 - 1e-9) <= tick <= highest * (1 + 1e-9)]


def round_up(value: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `value`."""
    power = 10.0 ** floor(log10(value))
    return next(step * power for step in (*TICK_STEPS, 10.0) if step * power >= value * (1 - 1e-9))


def log_bounds(values: Iterable[float], least_ratio: float = 4.0) -> tuple[float, float]:
    """Bounds for a log scale around all `values` above `LEAST_ON_LOG`, a little wider than they are."""
    positive = [value for value in values if value > LEAST_ON_LOG] or [1.0]
    lowest, highest = min(positive) / 1.15, max(positive) * 1.15
    widen = max(1.0, (least_ratio / (highest / lowest)) ** 0.5)
    return lowest / widen, highest * widen


class Drawing:
    """An SVG picture of `width` by `height` units, which scales with the page."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width = width
        self.height = height
        self._root = Element(
            "svg", {"viewBox": f"0 0 {_text(width)} {_text(height)}", "role": "img", "aria-label": label}
        )

    def markup(self) -> Markup:
        """The `<svg>` element, safe to stand in HTML."""
        # What was given as text has been escaped by the serialiser.
        return Markup(tostring(self._root, encoding="unicode"))  # noqa: S704

    def rect(self, x: float, y: float, width: float, height: float, style: str, **more: str | None) -> None:
        """A filled rectangle; `title` shows when the pointer is on it."""
        sides = {"x": x, "y": y, "width": max(width, 0.0), "height": max(height, 0.0)}
        self._add("rect", sides, style, **more)

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str, **more: str | None) -> None:
        """A straight line."""
        self._add("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2}, style, **more)

    def path(self, points: Sequence[Point], style: str, *, closed: bool = False, **more: str | None) -> None:
        """A line through `points`; nothing without points."""
        if points:
            line = "L".join(f"{_text(x)} {_text(y)}" for x, y in points)
            self._add("path", {}, style, d=f"M{line}{'Z' if closed else ''}", **more)

    def circle(self, x: float, y: float, radius: float, style: str, **more: str | None) -> None:
        """A dot."""
        self._add("circle", {"cx": x, "cy": y, "r": radius}, style, **more)

    def cross(self, x: float, y: float, reach: float, style: str, **more: str | None) -> None:
        """A × around a point."""
        d = f"M{_text(x - reach)} {_text(y - reach)}l{_text(2 * reach)} {_text(2 * reach)}"
        d += f"m0 {_text(-2 * reach)}l{_text(-2 * reach)} {_text(2 * reach)}"
        self._add("path", {}, style, d=d, **more)

    def text(self, x: float, y: float, words: str, style: str = "", anchor: Anchor = "start") -> None:
        """`words` with their baseline at `y`."""
        element = self._add("text", {"x": x, "y": y}, style, **{"text-anchor": anchor})
        element.text = words

    def _add(
        self, tag: str, numbers: dict[str, float], style: str, *, title: str | None = None, **words: str | None
    ) -> Element:
        attributes = {name: _text(number) for name, number in numbers.items()}
        attributes |= {name: word for name, word in words.items() if word is not None}
        if style:
            attributes["class"] = style
        element = SubElement(self._root, tag, attributes)
        if title is not None:
            SubElement(element, "title").text = title
        return element


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing with two scales; the area they span is where values are drawn."""

    drawing: Drawing
    x: Scale
    y: Scale

    def x_axis(self, ticks: Iterable[float], words: Callable[[float], str], title: str) -> None:
        """Grid lines, tick texts below the area, and the title at the right below them."""
        for tick in ticks:
            at = self.x(tick)
            self.drawing.line(at, self.y.start, at, self.y.end, "grid")
            self.drawing.text(at, self.y.start + 14, words(tick), "tick", "middle")
        self.drawing.line(self.x.start, self.y.start, self.x.end, self.y.start, "axis")
        if title:
            self.drawing.text(self.x.end, self.y.start + 29, title, "axis-title", "end")

    def y_axis(self, ticks: Iterable[float], words: Callable[[float], str], title: str) -> None:
        """Grid lines, tick texts left of the area, and the title above it."""
        for tick in ticks:
            at = self.y(tick)
            self.drawing.line(self.x.start, at, self.x.end, at, "grid")
            self.drawing.text(self.x.start - 6, at + 4, words(tick), "tick", "end")
        if title:
            self.drawing.text(self.x.start, self.y.end - 8, title, "axis-title")

    def line(self, points: Iterable[Point], style: str) -> None:
        """A line through values."""
        self.drawing.path([(self.x(x), self.y(y)) for x, y in points], f"line {style}")

    def columns(self, heights: Sequence[float], width: float, style: str, words: Callable[[int], str]) -> None:
        """Columns side by side from 0 on, each `width` wide on the x scale."""
        for place, height in enumerate(heights):
            if height > 0:
                left, right = self.x(place * width), min(self.x((place + 1) * width), self.x.end)
                top = self.y(height)
                # Half a unit of air between columns, unless they are too thin for it.
                air = 0.5 if right - left > 3 else 0.0
                self.drawing.rect(
                    left + air, top, right - left - 2 * air, self.y.start - top, style, title=words(place)
                )

    def limit(self, at: float, words: str) -> None:
        """A dashed vertical line at a limit, with its name at the top."""
        x = self.x(at)
        if self.x.start <= x <= self.x.end:
            self.drawing.line(x, self.y.start, x, self.y.end, "limit")
            anchor: Anchor = "end" if x > (self.x.start + self.x.end) / 2 else "start"
            self.drawing.text(x + (-4 if anchor == "end" else 4), self.y.end + 10, words, "limit-text", anchor)


def _text(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")
