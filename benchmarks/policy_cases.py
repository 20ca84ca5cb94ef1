"""Which traces, goals, numbers of workers and networks policies are compared on."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.policy_runs import Stream
from loadgen.simulator.policies import ABLATIONS, Goals
from loadgen.simulator.workload import Workload, build_workload
from loadgen.traces import read_trace
from shared.errors import StartupError

FILES = {
    "mooncake": "mooncake/conversation_trace.jsonl",
    "conv": "azure-llm-2023/AzureLLMInferenceTrace_conv.csv",
    "code": "azure-llm-2023/AzureLLMInferenceTrace_code.csv",
}
SLICES = {
    "mooncake": "mooncake_conversation_60.jsonl",
    "conv": "azure_conv_60.csv",
    "code": "azure_code_60.csv",
}
MIX = "mix"

LOOSE = Goals(ttft_s=2.0, tpot_s=0.1)
TIGHT = Goals(ttft_s=0.5, tpot_s=0.03)
TIGHT_MAX_INPUT = 16_384

NVLINK = ""
NETWORKS = {NVLINK: None, "25 Gbit/s": 3.1e9}
"""Bytes a second between workers; None: the profile's."""

BASE_WORKERS = 8
"""The split is found for so many; for others it has the same shares. So many workers get one copy of the trace."""

OWN_SPLIT = "ours-own-split"
"""Ours with the split at which it bears most, of as many workers; its parts are taken away there."""


class Case(NamedTuple):
    """A trace, what its users want, how many workers there are and what is between them."""

    trace: str
    goals: Goals
    num_workers: int
    network: str = NVLINK

    @property
    def name(self) -> str:
        name = f"{self.trace} {self.goals.ttft_s:g}s/{self.goals.tpot_s * 1000:g}ms {self.num_workers} workers"
        return f"{name}, {self.network}" if self.network else name

    def stream(self, num_rows: int | None) -> Stream:
        """What comes: of tight goals only what can keep them."""
        max_input = TIGHT_MAX_INPUT if self.goals == TIGHT else None
        return Stream(self.trace, max_input, num_rows, max(1, self.num_workers // BASE_WORKERS))


class Split(NamedTuple):
    """Prefill workers of a case: the simple policies' best, and ours."""

    num_prefill: int
    own_num_prefill: int

    def of(self, row: str) -> int:
        return self.own_num_prefill if row == OWN_SPLIT or row in ABLATIONS else self.num_prefill


def scaled(split: Split, num_workers: int) -> Split:
    """The same shares of another number."""
    return Split(*(min(max(round(num * num_workers / BASE_WORKERS), 1), num_workers - 1) for num in split))


def cases_of(traces: Sequence[str], sizes: Sequence[int], pattern: str) -> list[Case]:
    """All whose name has the pattern in it; a slow network lies between BASE_WORKERS only, and under one trace.

    Raises StartupError if there are none, or for what is no regular expression.
    """
    cases = [Case(trace, goals, size) for size in sizes for trace in traces for goals in (LOOSE, TIGHT)]
    if BASE_WORKERS in sizes:
        cases += [Case(traces[0], LOOSE, BASE_WORKERS, network) for network in NETWORKS if network != NVLINK]
    try:
        found = [case for case in cases if re.search(pattern, case.name)]
    except re.error as error:
        raise StartupError(f"--only {pattern}: {error}") from error
    if not found:
        raise StartupError(f"--only {pattern}: no case has it in its name")
    return found


def workloads_of(streams: Iterable[Stream], folder: Path | None) -> dict[Stream, Workload]:
    """Of whole traces in a folder, or of the slices that come with loadgen."""
    names = FILES if folder else SLICES
    base = folder or Path(__file__).parents[1] / "loadgen" / "data"
    rows = {name: read_trace(base / file) for name, file in names.items()}
    return {
        stream: build_workload(
            [(name, rows[name]) for name in (FILES if stream.trace == MIX else [stream.trace])],
            max_input=stream.max_input,
            num_rows=stream.num_rows,
            copies=stream.copies,
        )
        for stream in set(streams)
    }
