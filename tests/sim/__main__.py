"""Run schedules: `python -m tests.sim --seeds 10000`; one with its journal: `python -m tests.sim --seed 17`."""

import argparse
import os
import sys
import time

from tests.sim.mutants import MUTANTS
from tests.sim.running import run_in_processes, run_seeds


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _show(seed: int, mutant: str | None) -> int:
    (outcome,) = run_seeds([seed], mutant, full_journal=True)
    for line in outcome.journal:
        tell(line)
    tell(f"seed {seed}: {'; '.join(outcome.findings) or 'nothing found'}")
    return 1 if outcome.findings else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="only this one, with its journal")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="with this rule taken out")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return _show(arguments.seed, arguments.mutant)
    began_s = time.monotonic()
    num_run = num_requests = num_faults = num_found = 0
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    for outcome in run_in_processes(seeds, arguments.mutant, num_processes=arguments.processes):
        num_run += 1
        num_requests += outcome.num_requests
        num_faults += outcome.num_faults
        if outcome.findings:
            num_found += 1
            tell(f"seed {outcome.seed}: {'; '.join(outcome.findings)}")
    took_s = time.monotonic() - began_s
    tell(
        f"{num_run} schedules, {num_requests} requests, {num_faults} faults in {took_s:.0f} s"
        f" ({60 * num_run / took_s:.0f} schedules a minute); findings in {num_found}"
    )
    return 1 if num_found else 0


if __name__ == "__main__":
    sys.exit(main())
