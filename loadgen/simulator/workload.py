"""What is simulated: rows of traces with their turns, their pages and their times."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from loadgen.simulator.pages import Ends, PagePath, Segmented, cut_into_segments
from loadgen.traces import MOONCAKE_BLOCK_TOKENS, TraceRow
from shared.blocks import PAGE_TOKENS
from shared.errors import StartupError

BLOCK_PAGES = MOONCAKE_BLOCK_TOKENS // PAGE_TOKENS

SPREAD_S = 3.0
"""Of the trace's own time: the tick of Mooncake's clock, over which a seed spreads arrivals."""


@dataclass(frozen=True, slots=True)
class SimRow:
    """One request.

    Attributes:
        at_s: of the trace's own time.
        source: name of the trace; stands for the tenant where lengths are predicted.
        parent: index of the row that it is the next turn of.
        prompt: its full pages.
        path: segments of the full pages of prompt and answer.
    """

    index: int
    at_s: float
    source: str
    num_input: int
    num_output: int
    parent: int | None
    prompt: PagePath
    path: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows in the order of their times.

    Attributes:
        segment_pages: length of each segment.
        spread_s: of the trace's own time, over which a seed spreads each arrival.
        states_lengths: each request says how long its answer will be, as a replay's do; otherwise none does.
    """

    rows: tuple[SimRow, ...]
    segment_pages: tuple[int, ...]
    spread_s: float = SPREAD_S
    states_lengths: bool = False

    @property
    def span_s(self) -> float:
        """Of the trace's own time."""
        return self.rows[-1].at_s - self.rows[0].at_s

    def times(self, seed: int, speed: float) -> list[float]:
        """When each row is meant to come: moved by up to `spread_s`, then the clock runs so many times faster."""
        rng = Random(f"{seed}/simulated arrivals")
        start_s = self.rows[0].at_s
        return [(row.at_s - start_s + rng.random() * self.spread_s) / speed for row in self.rows]


def build_workload(
    traces: Sequence[tuple[str, Sequence[TraceRow]]],
    *,
    max_input: int | None = None,
    num_rows: int | None = None,
    copies: int = 1,
    history: bool = True,
) -> Workload:
    """The rows of all traces together, each trace from its own beginning.

    Args:
        traces: by name.
        max_input: leave out every conversation with a longer prompt in any of its turns.
        num_rows: the first so many of what is left.
        copies: each row comes so often, each copy in a conversation of its own, all at the same time of the trace.
        history: a next turn's prompt begins with the pages of its parent's answer too, as a conversation's does (and
            not those of a replay, which fills prompts by hash id).
    """
    drafts = [draft for name, rows in traces for draft in _drafts(name, rows, history=history)]
    if max_input is not None:
        drafts = _whole_chains_below(drafts, max_input)
    drafts = sorted(drafts, key=lambda draft: draft.row.at_s)[:num_rows]
    if not drafts:
        raise StartupError(f"no row is left: --max-input {max_input} leaves out every conversation")
    ends = [draft.ends for draft in drafts]
    segmented = cut_into_segments([draft.pages for draft in drafts], ends)
    return _rows_of(drafts, segmented, copies)


@dataclass(slots=True)
class _Draft:
    """A row while its trace is read.

    Attributes:
        parent: the draft that it is the next turn of.
        pages: names of the full pages of prompt and answer.
    """

    source: str
    row: TraceRow
    parent: "_Draft | None"
    pages: list[int]
    ends: Ends
    root: "_Draft | None" = None


def _drafts(name: str, rows: Sequence[TraceRow], *, history: bool) -> list[_Draft]:
    names = _Names(name)
    parents = infer_parents(rows)
    drafts: list[_Draft] = []
    for row, parent in zip(rows, parents, strict=True):
        parent_draft = None if parent is None else drafts[parent]
        num_prompt_pages = row.input_tokens // PAGE_TOKENS
        # The last token's KV is never computed.
        num_pages = max(num_prompt_pages, (row.input_tokens + row.output_tokens - 1) // PAGE_TOKENS)
        known = parent_draft.pages if parent_draft is not None and history else []
        pages = names.of_prompt(row, num_prompt_pages, known)
        pages += names.new(num_pages - num_prompt_pages)
        drafts.append(_Draft(name, row, parent_draft, pages, Ends(num_prompt_pages, num_pages)))
    return drafts


class _Names:
    """Names pages so that equal names mean equal tokens up to the page's end."""

    def __init__(self, trace: str) -> None:
        # Traces share no page: each has a range of its own.
        self._next = Random(trace).getrandbits(60) << 32
        self._of_block: dict[int, list[int]] = {}

    def new(self, count: int) -> list[int]:
        first = self._next
        self._next += count
        return list(range(first, self._next))

    def of_prompt(self, row: TraceRow, num_pages: int, known: Sequence[int]) -> list[int]:
        """Names of a prompt's pages, `known` being those of what its conversation has already."""
        if not row.hash_ids:
            return self.new(num_pages)
        pages: list[int] = []
        for place, hash_id in enumerate(row.hash_ids):
            count = min(BLOCK_PAGES, num_pages - place * BLOCK_PAGES)
            if count <= 0:
                break
            named = self._of_block.setdefault(hash_id, [])
            if len(named) < count:
                start = place * BLOCK_PAGES + len(named)
                named += known[start : (place + 1) * BLOCK_PAGES]
                named += self.new(max(0, count - len(named)))
            pages += named[:count]
        return pages


def infer_parents(rows: Sequence[TraceRow]) -> list[int | None]:
    """Of each row the latest one whose next turn it is, as far as hash ids tell.

    A next turn begins with all full blocks of the row before it and has room for its answer behind them. One full block
    alone tells nothing: every conversation of a trace may open with the same one.
    """
    parents: list[int | None] = []
    by_last_block: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        parents.append(_parent_of(row, rows, by_last_block))
        num_full = row.input_tokens // MOONCAKE_BLOCK_TOKENS
        if row.hash_ids and num_full >= 2:
            by_last_block.setdefault(row.hash_ids[num_full - 1], []).append(index)
    return parents


def _parent_of(row: TraceRow, rows: Sequence[TraceRow], by_last_block: dict[int, list[int]]) -> int | None:
    for hash_id in reversed(row.hash_ids):
        for index in reversed(by_last_block.get(hash_id, ())):
            before = rows[index]
            if before.at_s < row.at_s and before.input_tokens + before.output_tokens <= row.input_tokens:
                return index
    return None


def _whole_chains_below(drafts: list[_Draft], max_input: int) -> list[_Draft]:
    too_long: set[int] = set()
    for draft in drafts:
        draft.root = draft if draft.parent is None else draft.parent.root
        if draft.row.input_tokens > max_input:
            too_long.add(id(draft.root))
    return [draft for draft in drafts if id(draft.root) not in too_long]


def _rows_of(drafts: Sequence[_Draft], segmented: Segmented, copies: int) -> Workload:
    place_of = {id(draft): place for place, draft in enumerate(drafts)}
    num_segments = len(segmented.lengths)
    rows: list[SimRow] = []
    for place, draft in enumerate(drafts):
        parent = None if draft.parent is None else place_of.get(id(draft.parent))
        for copy in range(copies):
            path = tuple(segment + copy * num_segments for segment in segmented.paths[place])
            rows.append(
                SimRow(
                    index=place * copies + copy,
                    at_s=draft.row.at_s,
                    source=draft.source,
                    num_input=max(1, draft.row.input_tokens),
                    num_output=max(1, draft.row.output_tokens),
                    parent=None if parent is None else parent * copies + copy,
                    prompt=PagePath(path[: segmented.num_prompt_segments[place]], draft.ends.num_prompt_pages),
                    path=path,
                )
            )
    return Workload(tuple(rows), segmented.lengths * copies)
