"""The simple policies that ours has to beat. Each chooses a prefill and a decode worker apart, among those with room.

None of them has a decode worker compute a prompt, or a worker fetch pages from a peer; all reserve room as ingest did
before lengths were predicted.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from shared.blocks import pages_for
from shared.policy.holders import Holders
from shared.policy.placement import Chosen, Decision, NeverFits, NoRoomNow, capacity_tokens
from shared.policy.views import ClusterView, RequestView, WorkerView
from shared.wire.explanation import Explanation

MIN_PREFIX = 0.3
"""A run of fewer of the prompt's pages is not followed. Without such a limit all requests that open with one system
prompt go where it was first."""


class Pick(Protocol):
    """Chooses one of the workers of a role, which are at least one and in the order of their slots."""

    def __call__(self, workers: Sequence[WorkerView], request: RequestView, holders: Holders) -> WorkerView: ...


class Simple:
    """A policy of two picks."""

    def __init__(self, name: str, pick_prefill: Pick, pick_decode: Pick) -> None:
        self._explanation = Explanation(name, 0, ())
        self._pick_prefill = pick_prefill
        self._pick_decode = pick_decode

    def decide(self, request: RequestView, cluster: ClusterView, holders: Holders, *, tie_break: int) -> Decision:
        del tie_break
        limit_tokens = capacity_tokens(request.model, cluster)
        if limit_tokens is not None and request.num_tokens + request.max_new_tokens > limit_tokens:
            return NeverFits(limit_tokens)
        num_prefill_pages = pages_for(request.num_tokens)
        num_decode_pages = pages_for(request.num_tokens + request.reserve_new_tokens)
        prefill = with_room(cluster.prefill, num_prefill_pages)
        decode = with_room(cluster.decode, num_decode_pages)
        if not prefill or not decode:
            return NoRoomNow()
        return Chosen(
            prefill=self._pick_prefill(prefill, request, holders).ref,
            decode=self._pick_decode(decode, request, holders).ref,
            num_prefill_pages=num_prefill_pages,
            num_decode_pages=num_decode_pages,
            prefill_s=0.0,
            fetch=None,
            explain=lambda: self._explanation,
        )


def with_room(pool: Sequence[WorkerView], num_pages: int) -> list[WorkerView]:
    """Those that could take so many pages now."""
    return [
        worker
        for worker in pool
        if worker.takes_work
        and worker.num_credits < worker.max_running
        and worker.num_credit_pages + num_pages <= worker.num_pages
    ]


def _round_robin() -> Pick:
    last = -1

    def pick(workers: Sequence[WorkerView], request: RequestView, holders: Holders) -> WorkerView:
        nonlocal last
        del request, holders
        chosen = next((worker for worker in workers if worker.ref.slot > last), workers[0])
        last = chosen.ref.slot
        return chosen

    return pick


def _random(rng: Random) -> Pick:
    def pick(workers: Sequence[WorkerView], request: RequestView, holders: Holders) -> WorkerView:
        del request, holders
        return workers[rng.randrange(len(workers))]

    return pick


def least_loaded(workers: Sequence[WorkerView], rng: Random) -> WorkerView:
    """The fewest requests, of several one at random."""
    fewest = min(worker.num_credits for worker in workers)
    least = [worker for worker in workers if worker.num_credits == fewest]
    return least[rng.randrange(len(least))]


def _least_loaded(rng: Random) -> Pick:
    def pick(workers: Sequence[WorkerView], request: RequestView, holders: Holders) -> WorkerView:
        del request, holders
        return least_loaded(workers, rng)

    return pick


def _longest_prefix(rng: Random) -> Pick:
    """The longest run of the prompt's pages; of several, or where none is long, the least loaded one."""

    def pick(workers: Sequence[WorkerView], request: RequestView, holders: Holders) -> WorkerView:
        matches = holders.matches(request.blocks)
        runs = [matches.get(worker.ref.incarnation, (0, 0))[1] for worker in workers]
        longest = max(runs)
        if longest < MIN_PREFIX * len(request.blocks):
            return least_loaded(workers, rng)
        return least_loaded([worker for worker, run in zip(workers, runs, strict=True) if run == longest], rng)

    return pick


def _power_of_two(rng: Random) -> Pick:
    """Two at random, of these the one with fewer requests."""

    def pick(workers: Sequence[WorkerView], request: RequestView, holders: Holders) -> WorkerView:
        del request, holders
        one, other = workers[rng.randrange(len(workers))], workers[rng.randrange(len(workers))]
        return one if one.num_credits <= other.num_credits else other

    return pick


def _affinity(rng: Random) -> Simple:
    # For decode, too, affinity would gather conversations where they began and saves only what NVLink moves in no time.
    return Simple("prefix-affinity", _longest_prefix(rng), _least_loaded(rng))


BASELINES: dict[str, Callable[[Random], Simple]] = {
    "round-robin": lambda _: Simple("round-robin", _round_robin(), _round_robin()),
    "random": lambda rng: Simple("random", _random(rng), _random(rng)),
    "least-loaded": lambda rng: Simple("least-loaded", _least_loaded(rng), _least_loaded(rng)),
    "prefix-affinity": _affinity,
    "power-of-two": lambda rng: Simple("power-of-two", _power_of_two(rng), _power_of_two(rng)),
}
