"""Runs of many schedules, in this process or in several."""

import gc
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from tests.sim.mutants import taken_out
from tests.sim.schedule import Outcome, run_schedule
from tests.sim.world import Toolbox

SEEDS_A_TASK = 25


def run_seeds(seeds: Iterable[int], mutant: str | None = None, *, full_journal: bool = False) -> Iterator[Outcome]:
    """The schedules' outcomes, one after the other."""
    tools = Toolbox()
    gc.collect()
    gc.freeze()
    gc.disable()  # it would unwind what killed processes left, at any moment
    try:
        with taken_out(mutant):
            for seed in seeds:
                yield run_schedule(seed, tools, full_journal=full_journal)
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()


def run_in_processes(seeds: Sequence[int], mutant: str | None = None, *, num_processes: int) -> Iterator[Outcome]:
    """The same, in the order of the seeds, on several cores."""
    parts = [seeds[start : start + SEEDS_A_TASK] for start in range(0, len(seeds), SEEDS_A_TASK)]
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        for task in [pool.submit(_run_all, part, mutant) for part in parts]:
            yield from task.result()


def _run_all(seeds: Sequence[int], mutant: str | None) -> list[Outcome]:
    return list(run_seeds(seeds, mutant))
