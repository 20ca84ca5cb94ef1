"""In what form, in what order and in how many messages the KV of a prompt travels.

The model behind the choices. The KV of some pages is being computed and will be there in `compute_left_s`, every layer
taking as long as any other. It travels in groups of layers, each as soon as it is computed, one after the other over
a link that carries `bytes_per_s`; a group also costs the wire the latency of a message and the work of one more copy:

    compute   ├─ group 1 ─┼─ group 2 ─┼─ group 3 ─┤
    wire                  ├── 1 ──┤   ├── 2 ──┤   ├── 3 ──┤            the link waits for the compute
    wire                  ├────── 1 ──────┼────── 2 ──────┼────── 3 ──────┤    or the compute runs ahead of it

    end of the hand-over = the latest of: group g computed + wire of the groups from g on

With G equal groups, T the compute and W the wire of all of them, that is T/G + W where the wire is the slower of the
two, and T + W/G where it is the faster one. A prompt computed in several chunks is several such hand-overs in a row:
ask for each chunk's groups by itself.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

from shared.kv.layout import KvLayout
from shared.kv.progress import layers_a_mark
from shared.kv.wire_format import LayerSpan, WireFormat, packed_bytes

GROUP_COST_S = 0.3e-3
"""What a group costs beside its bytes and the link's latency: a copy launched at each end, and the talk about it."""

MIN_GAIN_S = 1e-3
MIN_GAIN_SHARE = 0.02
"""Layer groups are used where the hand-over ends at least this much earlier with them, in seconds and as a share of the
compute: they take turns with the prefill on the device, so what gains less may as well wait."""

SLACK_S = 2e-3
SLACK_SHARE = 0.1
"""A hand-over is late if it ends after the compute by more than this, in seconds and as a share of the compute."""

UNMEASURED_PART_BYTES = 32 * 2**20
"""The most in one part on a link that was not measured: it may be a slow one."""

FAIR_PART_S = 0.05
"""How long a part may keep the link from other pulls. Parts that fit their arena stay below it on a fast link."""


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """What a link does, as measured.

    Attributes:
        latency_s: of one message of few bytes.
    """

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class Part:
    """What travels in one message: `layers` of the pages that entries [start, end) of a pull's `want` name."""

    start: int
    end: int
    layers: LayerSpan

    @property
    def num_pages(self) -> int:
        return self.end - self.start


def choose_format(
    layout: KvLayout,
    *,
    num_pages: int,
    compute_left_s: float | None,
    link: LinkSpeed | None,
    max_loss: WireFormat,
) -> WireFormat:
    """The least lossy form, `max_loss` at most, in which the hand-over is not late; if all are late, the fastest.

    Args:
        num_pages: still to be sent.
        compute_left_s: until all of them are computed; None if not known, and then native it is.
        link: None if not measured, and then native it is.
    """
    if link is None or compute_left_s is None or max_loss is WireFormat.NATIVE:
        return WireFormat.NATIVE
    allowed = [fmt for fmt in WireFormat if fmt.loss <= max_loss.loss]
    ends_s: list[float] = []
    for fmt in allowed:
        groups = choose_layer_groups(layout, num_pages=num_pages, compute_left_s=compute_left_s, link=link, fmt=fmt)
        ends_s.append(_end_s(layout, groups, num_pages, compute_left_s, link, fmt))
        if ends_s[-1] - compute_left_s <= max(SLACK_S, SLACK_SHARE * compute_left_s):
            return fmt
    return allowed[ends_s.index(min(ends_s))]


def choose_layer_groups(
    layout: KvLayout, *, num_pages: int, compute_left_s: float | None, link: LinkSpeed | None, fmt: WireFormat
) -> tuple[LayerSpan, ...]:
    """The groups, in order and covering all layers, with which the hand-over ends first; one where that gains little.

    Args:
        num_pages: being computed now.
        compute_left_s: until all of them are computed; None if not known, and then there is one group.
        link: None if not measured, and then there is one group.
    """
    whole = (LayerSpan(0, layout.num_layers),)
    if link is None or not compute_left_s:
        return whole
    little_s = max(MIN_GAIN_S, MIN_GAIN_SHARE * compute_left_s)
    one_ends_s = _end_s(layout, whole, num_pages, compute_left_s, link, fmt)
    if one_ends_s - compute_left_s < little_s:
        return whole  # there is no more to gain than what is sent after the compute
    plans = [_equal_groups(layout.num_layers, number) for number in range(1, _num_marks(layout.num_layers) + 1)]
    ends_s = [_end_s(layout, groups, num_pages, compute_left_s, link, fmt) for groups in plans]
    best_s = min(ends_s)
    return whole if one_ends_s - best_s < little_s else plans[ends_s.index(best_s)]


def cut_parts(
    layout: KvLayout,
    *,
    start: int,
    end: int,
    groups: tuple[LayerSpan, ...],
    fmt: WireFormat,
    link: LinkSpeed | None,
    max_part_bytes: int,
) -> tuple[Part, ...]:
    """The parts in which the wanted pages [start, end) travel, in the order to send them: group by group.

    On a fast link they are as few as `max_part_bytes` allows; on a slow one each takes about `FAIR_PART_S`, on one not
    measured it has `UNMEASURED_PART_BYTES`. A part has whole pages, or if a page is too much, some layers of one page,
    one at the least.

    Args:
        fmt: of all these pages.

    Raises:
        ValueError: one layer of one page is over `max_part_bytes`.
    """
    if packed_bytes(layout, fmt, 1, 1) > max_part_bytes:
        raise ValueError(f"a layer of a page, {packed_bytes(layout, fmt, 1, 1)} bytes, is over {max_part_bytes} bytes")
    fair_bytes = min(max_part_bytes, UNMEASURED_PART_BYTES if link is None else int(link.bytes_per_s * FAIR_PART_S))
    parts: list[Part] = []
    for group in groups:
        page_bytes = packed_bytes(layout, fmt, 1, group.num_layers)
        if page_bytes <= fair_bytes:
            sizes = _equal(end - start, fair_bytes // page_bytes)
            parts += [Part(first, last, group) for first, last in pairwise(accumulate(sizes, initial=start))]
        else:
            max_layers = max(1, fair_bytes // packed_bytes(layout, fmt, 1, 1))
            bounds = list(accumulate(_equal(group.num_layers, max_layers), initial=group.first))
            parts += [Part(page, page + 1, LayerSpan(*span)) for page in range(start, end) for span in pairwise(bounds)]
    return tuple(parts)


def _num_marks(num_layers: int) -> int:
    return -(-num_layers // layers_a_mark(num_layers))


def _equal_groups(num_layers: int, number: int) -> tuple[LayerSpan, ...]:
    """`number` groups of nearly as many layers, each ending at a mark."""
    num_marks, every = _num_marks(num_layers), layers_a_mark(num_layers)
    bounds = [min(num_layers, index * num_marks // number * every) for index in range(number + 1)]
    return tuple(LayerSpan(first, end) for first, end in pairwise(bounds))


def _end_s(
    layout: KvLayout,
    groups: tuple[LayerSpan, ...],
    num_pages: int,
    compute_left_s: float,
    link: LinkSpeed,
    fmt: WireFormat,
) -> float:
    """Seconds from now until the last group has arrived; see the module's model."""
    arrived_s = 0.0
    for group in groups:
        computed_s = compute_left_s * group.end / layout.num_layers
        num_bytes = packed_bytes(layout, fmt, num_pages, group.num_layers)
        arrived_s = max(arrived_s, computed_s) + GROUP_COST_S + link.latency_s + num_bytes / link.bytes_per_s
    return arrived_s


def _equal(count: int, at_most: int) -> list[int]:
    """`count` things in as few shares of `at_most` as will do, of nearly equal size."""
    number = -(-count // at_most)
    return [(index + 1) * count // number - index * count // number for index in range(number)]
