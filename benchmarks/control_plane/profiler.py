"""Profiles running processes from outside with py-spy (a development package); the services know nothing of it."""

import asyncio
import shutil
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from shared.errors import StartupError

RATE_HZ = 250
NUM_TOP = 40


def py_spy_program() -> str:
    """Path of py-spy. Raises StartupError if it is missing."""
    path = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if path is None:
        raise StartupError("--profile needs py-spy: install the extra `dev`")
    return path


@asynccontextmanager
async def profiled(pids: Mapping[str, int], folder: Path, seconds: float) -> AsyncGenerator[None]:
    """Samples each process for `seconds` while the body runs.

    Only a thread that holds the interpreter's lock is sampled: a waiting event loop or device costs nobody anything.
    Writes `<name>.folded` (one stack a line, for flame graphs) and `<name>.txt` (the functions at the top). Processes
    are not paused for a sample, so that what is measured meanwhile stays nearly right.
    """
    py_spy = py_spy_program()
    whole_s = max(1, int(seconds) - 1)
    recorders = {
        name: await asyncio.create_subprocess_exec(
            *(py_spy, "record", "--pid", str(pid), "--duration", str(whole_s), "--rate", str(RATE_HZ)),
            *("--format", "raw", "--threads", "--gil", "--nonblocking", "--output", str(folder / f"{name}.folded")),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        for name, pid in pids.items()
    }
    try:
        yield
    finally:
        ends = await asyncio.gather(*(recorder.communicate() for recorder in recorders.values()))
    for (name, recorder), (_, errors) in zip(recorders.items(), ends, strict=True):
        if recorder.returncode != 0:
            raise StartupError(f"py-spy could not profile {name}: {errors.decode(errors='replace').strip()[-500:]}")
        lines = (folder / f"{name}.folded").read_text().splitlines()
        (folder / f"{name}.txt").write_text(top_functions(lines, whole_s * RATE_HZ))


def top_functions(folded: Iterable[str], num_looks: int) -> str:
    """By thread the functions that were met most often, by themselves and with what they called.

    Percentages are of `num_looks`, which is how often a look was taken: 100% is a whole core's time.
    """
    own: dict[str, Counter[str]] = {}
    inclusive: dict[str, Counter[str]] = {}
    for line in folded:
        stack, _, number = line.rpartition(" ")
        thread, *frames = stack.split(";")
        if not frames:
            continue
        own.setdefault(thread, Counter())[frames[-1]] += int(number)
        for frame in dict.fromkeys(frames):  # a recursive function counts once
            inclusive.setdefault(thread, Counter())[frame] += int(number)
    parts: list[str] = []
    for thread in sorted(own, key=lambda name: -own[name].total()):
        parts.append(f"{100 * own[thread].total() / num_looks:6.2f}%  {thread}")
        for title, counts in (("itself", own[thread]), ("with callees", inclusive[thread])):
            parts.append(f"  {title}")
            parts += [f"    {100 * number / num_looks:6.2f}%  {frame}" for frame, number in counts.most_common(NUM_TOP)]
    return "\n".join(parts) + "\n"
