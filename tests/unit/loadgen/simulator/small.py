"""Small hardware and workloads whose times can be checked by hand."""

from loadgen.simulator.hardware import Hardware, Hops, WorkerKind
from loadgen.simulator.lengths import PlainLengths
from loadgen.simulator.policies import Goals, contender
from loadgen.simulator.simulation import Finished, Setup, simulate
from loadgen.simulator.workload import SPREAD_S, Workload, build_workload
from loadgen.traces import TraceRow
from shared.policy.profile import LinkRate, SpeedProfile

SPEEDS = SpeedProfile(base_s=0.01, row_s=0.001, context_s=1e-6, token_s=1e-4, pair_s=0.0)
HOPS = Hops(placed_s=0.004, work_s=0.002, token_s=0.003, frame_s=0.0025, feed_s=0.25)
PAGE_BYTES = 1000
PULL = LinkRate(latency_s=0.001, bytes_per_s=1e6)

GOALS = Goals(ttft_s=2.0, tpot_s=0.1)


def kind(*, num_pages=1000, num_host_pages=0, max_running=8, max_batch_tokens=512) -> WorkerKind:
    return WorkerKind(
        speeds=SPEEDS,
        num_pages=num_pages,
        num_host_pages=num_host_pages,
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
    )


def hardware(*, prefill=None, decode=None) -> Hardware:
    return Hardware(
        name="small",
        source="made up",
        max_context=100_000,
        page_bytes=PAGE_BYTES,
        prefill=prefill or kind(),
        decode=decode or kind(),
        peer_link=PULL,
        host_link=LinkRate(latency_s=0.001, bytes_per_s=1e6),
        hops=HOPS,
    )


def rows(*requests) -> list[TraceRow]:
    """(at_s, input, output) or (at_s, input, output, hash ids) each."""
    return [TraceRow(index, request[0], *request[1:]) for index, request in enumerate(requests)]


def workload(*requests) -> Workload:
    return build_workload([("small", rows(*requests))])


def run(load: Workload, policy="round-robin", **options) -> Finished:
    """At a speed at which the spread of arrivals is nothing."""
    options = {"hardware": hardware(), "num_prefill": 1, "num_decode": 1, "max_new_tokens": 512} | options
    chosen = contender(policy, GOALS, options.get("seed", 0)) if isinstance(policy, str) else policy
    lengths = getattr(chosen, "lengths", PlainLengths())
    return simulate(load, chosen.policy, lengths, Setup(**options))


INSTANTLY = SPREAD_S * 1e12
"""A speed at which all rows come at once, in the order that the seed drew."""
