"""What `loadgen replay --save-schedule` sent, as a workload: the same requests at the same times."""

from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from loadgen.schedule import ScheduledRow
from loadgen.simulator.pages import Ends, PagePath, cut_into_segments
from loadgen.simulator.workload import SimRow, Workload
from shared.blocks import PAGE_TOKENS
from shared.errors import StartupError

ROWS: TypeAdapter[ScheduledRow] = TypeAdapter(ScheduledRow)


@dataclass(frozen=True)
class _Head:
    version: Literal[1]


HEAD: TypeAdapter[_Head] = TypeAdapter(_Head)


def is_schedule(path: Path) -> bool:
    """Whether the file is a schedule rather than a trace."""
    try:
        with path.open("rb") as lines:
            return lines.readline().startswith(b'{"version":')
    except OSError:
        return False


def read_schedule(path: Path) -> Workload:
    """Raises StartupError, naming the line, for a file that is no schedule."""
    lines = path.read_bytes().splitlines()
    rows: list[ScheduledRow] = []
    for number, line in enumerate(lines, start=1):
        try:
            if number == 1:
                HEAD.validate_json(line)
            else:
                rows.append(ROWS.validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise StartupError(f"{path}, line {number}: {place}: {first['msg']}") from error
    if not rows:
        raise StartupError(f"{path}: a schedule without a row")
    return workload_of_schedule(rows)


def workload_of_schedule(rows: list[ScheduledRow]) -> Workload:
    """The prompts share what `prompts.prompt_ids` makes them share: no next turn has its parent's answer in it."""
    names: dict[tuple[object, ...], int] = {}
    paths: list[list[int]] = []
    ends: list[Ends] = []
    for row in rows:
        num_prompt_pages = row.input_tokens // PAGE_TOKENS
        num_pages = max(num_prompt_pages, (row.input_tokens + row.output_tokens - 1) // PAGE_TOKENS)
        keys = _prompt_pages(row)
        keys += [("answer", row.row, page) for page in range(num_prompt_pages, num_pages)]
        paths.append([names.setdefault(key, len(names)) for key in keys])
        ends.append(Ends(num_prompt_pages, num_pages))
    cut = cut_into_segments(paths, ends)
    return Workload(
        tuple(
            SimRow(
                index=place,
                at_s=row.at_s,
                source="replay",
                num_input=row.input_tokens,
                num_output=row.output_tokens,
                parent=None,
                prompt=PagePath(cut.paths[place][: cut.num_prompt_segments[place]], ends[place].num_prompt_pages),
                path=cut.paths[place],
            )
            for place, row in enumerate(rows)
        ),
        cut.lengths,
        spread_s=0.0,
        states_lengths=True,
    )


def _prompt_pages(row: ScheduledRow) -> list[tuple[object, ...]]:
    """A page is named by the block in which it ends, which names all before it, and by where in that it ends."""
    if not row.blocks:
        return [("row", row.trace_index, page) for page in range(row.input_tokens // PAGE_TOKENS)]
    keys: list[tuple[object, ...]] = []
    start = 0
    for block in row.blocks:
        end = start + block.num_tokens
        first = (start // PAGE_TOKENS + 1) * PAGE_TOKENS
        keys += [("block", block.hash_id, stop - start) for stop in range(first, end + 1, PAGE_TOKENS)]
        start = end
    return keys
