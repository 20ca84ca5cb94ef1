"""Policies by name: the simple ones, ours, and ours without one of its parts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

from loadgen.simulator.baselines import BASELINES
from loadgen.simulator.lengths import LearntLengths, Lengths, PlainLengths
from shared.blocks import BlockHash
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
            return Contender(Placement(replace(rules, num_decode_candidates=1), tie_offset), predicted)
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
