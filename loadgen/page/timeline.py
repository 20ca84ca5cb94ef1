"""The run over time: what each request did when, how many were under way, what came and what was made."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat

from loadgen.measure import Record, Summary, summarise

MAX_BARS = 500
"""Above so many requests bars would be thinner than a pixel: latencies by the second of arrival stand for them."""

BIN_WIDTHS_S = tuple(step * 10.0**power for power in range(-3, 6) for step in (1, 2, 5))
FLOW_BINS = 60
LATENCY_BINS = 40


@dataclass(frozen=True, slots=True)
class TimelineBar:
    """One request; times are seconds after the start of the run."""

    record: Record

    @property
    def ended_s(self) -> float:
        """End of its bar: of its answer, or of the attempt; its intended time if it was never sent."""
        known = (self.record.answered_s, self.record.ended_s, self.record.first_token_s, self.record.sent_s)
        return max((at_s for at_s in known if at_s is not None), default=self.record.row.at_s)


@dataclass(frozen=True, slots=True)
class LatencyBin:
    """Requests whose intended time lies in one stretch of the run."""

    from_s: float
    to_s: float
    requests: int
    failed: int
    ttft: Summary | None
    e2el: Summary | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """Either `bars`, one for each request, or `bins`.

    Attributes:
        end_s: where the time axis ends.
    """

    end_s: float
    bars: tuple[TimelineBar, ...]
    bins: tuple[LatencyBin, ...]


@dataclass(frozen=True, slots=True)
class Flow:
    """Rates over the run, bin by bin.

    Attributes:
        in_flight: most requests under way at any moment of the bin.
        arrivals_per_s: by intended time.
        tokens_per_s: of the answers, as their pieces came.
    """

    bin_s: float
    in_flight: tuple[int, ...]
    arrivals_per_s: tuple[float, ...]
    tokens_per_s: tuple[float, ...]


def timeline_of(records: Sequence[Record], duration_s: float) -> Timeline:
    """Bars up to `MAX_BARS` requests, bins above."""
    bars = tuple(TimelineBar(record) for record in records)
    end_s = max((bar.ended_s for bar in bars), default=0.0)
    end_s = max(end_s, duration_s) or 1.0
    if len(bars) <= MAX_BARS:
        return Timeline(end_s, bars, ())
    bin_s = bin_width_s(end_s, LATENCY_BINS)
    binned: list[list[Record]] = [[] for _ in range(_num_bins(end_s, bin_s))]
    for record in records:
        binned[_bin(record.row.at_s, bin_s, len(binned))].append(record)
    bins = tuple(_latency_bin(place * bin_s, bin_s, inside) for place, inside in enumerate(binned))
    return Timeline(end_s, (), bins)


def flow_of(records: Sequence[Record], end_s: float) -> Flow:
    """Rates of a run that ends at `end_s`."""
    bin_s = bin_width_s(end_s, FLOW_BINS)
    num_bins = _num_bins(end_s, bin_s)
    arrivals, tokens = [0.0] * num_bins, [0.0] * num_bins
    for record in records:
        arrivals[_bin(record.row.at_s, bin_s, num_bins)] += 1 / bin_s
        for at_s, count in token_times(record):
            tokens[_bin(at_s, bin_s, num_bins)] += count / bin_s
    return Flow(bin_s, most_in_flight(records, bin_s, num_bins), tuple(arrivals), tuple(tokens))


def token_times(record: Record) -> Iterable[tuple[float, float]]:
    """(second, tokens) of each piece of the answer; each piece but the first is taken to bring equally many.

    Where no pieces were seen (Kafka) the tokens are spread evenly from the first to the last.
    """
    first_s, last_s, tokens = record.first_token_s, record.last_token_s, record.output_tokens
    if first_s is None or last_s is None:
        return ()
    if record.gaps_s:
        each = 1.0 if tokens is None else (tokens - 1) / len(record.gaps_s)
        return zip(accumulate(record.gaps_s, initial=first_s), chain((1.0,), repeat(each)), strict=False)
    if tokens is None or tokens < 2:
        return ((first_s, 1.0),)
    step_s = (last_s - first_s) / (tokens - 1)
    return ((first_s + place * step_s, 1.0) for place in range(tokens))


def most_in_flight(records: Iterable[Record], bin_s: float, num_bins: int) -> tuple[int, ...]:
    """The most requests that were under way at once, bin by bin."""
    changes: list[tuple[float, int]] = []
    for record in records:
        if record.sent_s is not None and record.ended_s is not None:
            changes += [(record.sent_s, 1), (record.ended_s, -1)]
    most = [0] * num_bins
    current = last = 0
    for at_s, change in sorted(changes):
        place = _bin(at_s, bin_s, num_bins)
        most[last + 1 : place + 1] = [current] * (place - last)
        last = place
        current += change
        most[place] = max(most[place], current)
    return tuple(most)


def bin_width_s(end_s: float, wanted: int) -> float:
    """The least of 1, 2, 5 times a power of ten that makes at most `wanted` bins."""
    place = bisect_right(BIN_WIDTHS_S, end_s / wanted)
    return BIN_WIDTHS_S[min(place, len(BIN_WIDTHS_S) - 1)]


def _num_bins(end_s: float, bin_s: float) -> int:
    return int(end_s / bin_s) + 1


def _bin(at_s: float, bin_s: float, num_bins: int) -> int:
    return min(max(int(at_s / bin_s), 0), num_bins - 1)


def _latency_bin(from_s: float, bin_s: float, records: Sequence[Record]) -> LatencyBin:
    done = [record for record in records if record.completed]
    return LatencyBin(
        from_s=from_s,
        to_s=from_s + bin_s,
        requests=len(records),
        failed=len(records) - len(done),
        ttft=summarise(record.ttft_s for record in done),
        e2el=summarise(record.e2el_s for record in done),
    )
