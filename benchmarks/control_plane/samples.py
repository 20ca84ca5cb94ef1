"""From what was seen of each request to figures in milliseconds; the same for the bare engine and the path.

TTFT   first token - intended time (closed loads: - send)
ITL    mean: all seconds between first and last tokens over all gaps between tokens; percentiles: of the gaps seen
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import fmean

from benchmarks.control_plane.loads import Load
from loadgen.measure import percentile
from shared.request import Event

SENT = "sent"
FIRST_PIECE = "first_piece"
RECEIVED = "received"

HOPS: tuple[tuple[str, str], ...] = (
    (SENT, Event.ACCEPTED),
    (Event.ACCEPTED, Event.ADMITTED),
    (Event.ADMITTED, Event.PLACED),
    (Event.PLACED, Event.PREFILLING),
    (Event.PREFILLING, Event.FIRST_TOKEN),
    (Event.FIRST_TOKEN, FIRST_PIECE),
    (Event.FIRST_TOKEN, Event.TRANSFERRING),
    (Event.TRANSFERRING, Event.DECODING),
    (Event.DECODING, Event.FINISHED),
    (Event.FINISHED, RECEIVED),
)
"""Where a request's time goes; SENT, FIRST_PIECE and RECEIVED are the client's. `accepted` has whole milliseconds."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request that was answered in full; times are seconds after the start of its load.

    Attributes:
        at_s: when it was to be sent.
        gaps_s: between the pieces of its answer (bare: between tokens).
        stamps: unix seconds by event, with the client's own.
    """

    at_s: float
    sent_s: float
    first_token_s: float
    gaps_s: Sequence[float]
    output_tokens: int
    cached_tokens: int = 0
    stamps: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def last_token_s(self) -> float:
        return self.first_token_s + sum(self.gaps_s)

    @property
    def tokens_per_piece(self) -> float:
        return self.output_tokens / (len(self.gaps_s) + 1)


Distribution = dict[str, float | int]


def distribution_ms(values_s: Iterable[float]) -> Distribution | None:
    """Count, mean, p50, p90, p99 and maximum in milliseconds; None of nothing."""
    ascending = sorted(value * 1000 for value in values_s)
    if not ascending:
        return None
    return {
        "count": len(ascending),
        "mean": round(fmean(ascending), 4),
        **{f"p{percent}": round(percentile(ascending, percent), 4) for percent in (50, 90, 99)},
        "max": round(ascending[-1], 4),
    }


def summary(samples: Sequence[Sample], load: Load) -> dict[str, object]:
    """The figures of one load."""
    measured = [sample for sample in samples if load.measures(sample.at_s)]
    answered = [sample for sample in measured if sample.output_tokens > 1]
    num_gaps = sum(sample.output_tokens - 1 for sample in answered)
    streaming_s = sum(sample.last_token_s - sample.first_token_s for sample in answered)
    return {
        "requests": len(measured),
        "mean_streams": round(mean_in_flight(samples, load), 2),
        "output_tokens_per_s": round(tokens_in_window(samples, load) / load.seconds, 1),
        "ttft_ms": distribution_ms(sample.first_token_s - sample.at_s for sample in measured),
        "ttft_from_send_ms": distribution_ms(sample.first_token_s - sample.sent_s for sample in measured),
        "itl_mean_ms": round(1000 * streaming_s / num_gaps, 4) if num_gaps else None,
        "gap_ms": distribution_ms(gap for sample in answered for gap in sample.gaps_s),
        "second_token_ms": distribution_ms(sample.gaps_s[0] for sample in answered if sample.gaps_s),
        "send_lateness_ms": distribution_ms(sample.sent_s - sample.at_s for sample in measured),
        "tokens_per_piece": round(fmean(sample.tokens_per_piece for sample in measured), 4) if measured else None,
        "cached_prompt_tokens": sum(sample.cached_tokens for sample in measured),
    }


def hops(samples: Iterable[Sample], load: Load) -> dict[str, Distribution]:
    """Milliseconds between successive events of the requests measured."""
    measured = [sample.stamps for sample in samples if load.measures(sample.at_s)]
    found = {
        f"{earlier} → {later}": distribution_ms(
            stamps[later] - stamps[earlier] for stamps in measured if earlier in stamps and later in stamps
        )
        for earlier, later in HOPS
    }
    return {name: times for name, times in found.items() if times is not None}


def served_itl_mean_ms(samples: Iterable[Sample], load: Load) -> float | None:
    """Mean time between tokens by the decode worker's stamps, from its first token of a request to the last."""
    seconds, gaps = 0.0, 0
    for sample in samples:
        stamps = sample.stamps
        if load.measures(sample.at_s) and Event.DECODING in stamps and Event.FINISHED in stamps:
            seconds += stamps[Event.FINISHED] - stamps[Event.DECODING]
            gaps += sample.output_tokens - 2  # prefill made the first token, and `decoding` stamps the second
    return round(1000 * seconds / gaps, 4) if gaps > 0 else None


def mean_in_flight(samples: Iterable[Sample], load: Load) -> float:
    """Requests between send and last token, averaged over the measured part."""
    start_s, end_s = load.lead_s, load.lead_s + load.seconds
    return sum(max(0.0, min(s.last_token_s, end_s) - max(s.sent_s, start_s)) for s in samples) / load.seconds


def tokens_in_window(samples: Iterable[Sample], load: Load) -> float:
    """Tokens that came in the measured part, whichever request they belong to."""
    return sum(
        sample.tokens_per_piece
        for sample in samples
        for at_s in accumulate(sample.gaps_s, initial=sample.first_token_s)
        if load.measures(at_s)
    )


def added(path: Mapping[str, object], bare: Mapping[str, object], bare_decode_ms: float) -> dict[str, float | None]:
    """What the path adds to the bare engine, from two summaries; `bare_decode_ms` is the pure decode step."""
    itl_ms, bare_itl_ms = path["itl_mean_ms"], bare["itl_mean_ms"]
    return {
        "ttft_p50_ms": _difference(path["ttft_ms"], bare["ttft_ms"], "p50"),
        "ttft_p99_ms": _difference(path["ttft_ms"], bare["ttft_ms"], "p99"),
        "itl_mean_percent_of_bare": _more_percent(itl_ms, bare_itl_ms),
        "itl_mean_percent_of_bare_decode": _more_percent(itl_ms, bare_decode_ms),
        "throughput_percent": _more_percent(path["output_tokens_per_s"], bare["output_tokens_per_s"]),
    }


def _difference(path: object, bare: object, name: str) -> float | None:
    if not isinstance(path, dict) or not isinstance(bare, dict):
        return None
    return round(path[name] - bare[name], 4)


def _more_percent(path: object, bare: object) -> float | None:
    """By how many percent of `bare` `path` is more."""
    if not isinstance(path, int | float) or not isinstance(bare, int | float) or not bare:
        return None
    return round(100 * (path / bare - 1), 2)
