"""Policies by name: the simple ones, ours, and ours without one of its parts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

from loadgen.simulator.baselines import BASELINES, least_loaded, with_room
from loadgen.simulator.lengths import LearntLengths, Lengths, PlainLengths
from shared.blocks import BlockHash, pages_for
from shared.errors import StartupError
from shared.policy.holders import Holders
from shared.policy.placement import Decision, Rules, place
from shared.policy.views import ClusterView, RequestView
from shared.request import Incarnation

OURS = "ours"


class Policy(Protocol):
    """Decides where a request runs."""

    def decide(self, request: RequestView, cluster: ClusterView, holders: Holders, *, tie_break: int) -> Decision: ...


@dataclass(frozen=True, slots=True)
class Goals:
    """What users want: seconds to the first token, mean seconds for each later one."""

    ttft_s: float
    tpot_s: float


class Placement:
    """Ours, as ingest runs it."""

    def __init__(self, rules: Rules, tie_offset: int) -> None:
        self._rules = rules
        self._tie_offset = tie_offset

    def decide(self, request: RequestView, cluster: ClusterView, holders: Holders, *, tie_break: int) -> Decision:
        return place(request, cluster, holders, self._rules, tie_break=tie_break + self._tie_offset)


class _NobodyHolds(Holders):
    def matches(self, blocks: Sequence[BlockHash]) -> dict[Incarnation, tuple[int, int]]:
        del blocks
        return {}

    def overlap(self, holder: Incarnation, blocks: Sequence[BlockHash]) -> tuple[int, int]:
        del holder, blocks
        return 0, 0


class _Blind:
    """A policy that does not know who holds what."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._nobody = _NobodyHolds()

    def decide(self, request: RequestView, cluster: ClusterView, holders: Holders, *, tie_break: int) -> Decision:
        del holders
        return self._policy.decide(request, cluster, self._nobody, tie_break=tie_break)


class _DecodeFirst:
    """A policy that has no say in where a request decodes: that is the worker with room that has the fewest, so no
    decode worker is weighed against another by what is there of the prompt, by its steps, or with a way to prefill."""

    def __init__(self, policy: Policy, rng: Random) -> None:
        self._policy = policy
        self._rng = rng

    def decide(self, request: RequestView, cluster: ClusterView, holders: Holders, *, tie_break: int) -> Decision:
        roomy = with_room(cluster.decode, pages_for(request.num_tokens + request.reserve_new_tokens))
        if roomy:
            chosen = least_loaded(roomy, self._rng)
            # The others stay: they lend pages, and what is free there is free.
            decode = tuple(view if view is chosen else replace(view, max_context=0) for view in cluster.decode)
            cluster = ClusterView(cluster.prefill, decode)
        return self._policy.decide(request, cluster, holders, tie_break=tie_break)


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of a comparison.

    Attributes:
        gauges: it sees what workers said of themselves, and no credits.
    """

    policy: Policy
    lengths: Lengths
    gauges: bool = False


ABLATIONS = (
    "no-prediction",
    "no-co-scheduling",
    "no-locality",
    "no-local-prefill",
    "no-fetch",
    "gauges",
)


def policy_names() -> tuple[str, ...]:
    """All that `contender` knows."""
    return (*BASELINES, OURS, *ABLATIONS)


def contender(name: str, goals: Goals, seed: int) -> Contender:
    """A policy that has decided nothing yet. Raises StartupError for a name that is not known."""
    rng = Random(f"{seed}/{name}")
    if name in BASELINES:
        return Contender(BASELINES[name](rng), PlainLengths())
    rules = Rules(goals.ttft_s, goals.tpot_s)
    predicted, tie_offset = LearntLengths(), seed * 7919
    match name:
        case "ours":
            return Contender(Placement(rules, tie_offset), predicted)
        case "no-prediction":
            return Contender(Placement(rules, tie_offset), PlainLengths())
        case "no-co-scheduling":
            return Contender(_DecodeFirst(Placement(rules, tie_offset), rng), predicted)
        case "no-locality":
            return Contender(_Blind(Placement(rules, tie_offset)), predicted)
        case "no-local-prefill":
            return Contender(Placement(replace(rules, local_prefill=False), tie_offset), predicted)
        case "no-fetch":
            return Contender(Placement(replace(rules, fetch=False), tie_offset), predicted)
        case "gauges":
            return Contender(Placement(rules, tie_offset), predicted, gauges=True)
        case _:
            raise StartupError(f"--policy {name}: it is one of {', '.join(policy_names())}")
