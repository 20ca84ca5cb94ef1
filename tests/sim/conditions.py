"""What else differs from one schedule to the next: sizes, speeds, how many wait, and what whoever places likes.

Each seed draws it apart from its faults. Most of what a seed does not draw is off, so that each part is tried with and
without the others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from unittest.mock import patch

from services.ingest import low_water, placer
from services.ingest import service as ingest_service
from shared.blocks import pages_for
from shared.policy.holders import Holders
from shared.policy.placement import Chosen, Decision, Fetch, Rules, place
from shared.policy.profile import SpeedProfile, StepWork
from shared.policy.profile_fit import MeasuredStep
from shared.policy.views import ClusterView, RequestView
from shared.wire.explanation import Explanation
from shared.worker.peers import GONE_AFTER_S

AGED_S = GONE_AFTER_S + 3.0
"""Then whoever was there from the beginning calls gone whom it does not see."""

ELSEWHERE = Explanation("the simulation would have it so", 1)


@dataclass(frozen=True)
class Conditions:
    """Attributes:
    age_s: the system ran for so long before anything came.
    num_joining: workers that come while it runs, each with a rush of requests.
    step_s: of an engine's step, about.
    num_pages, num_host_pages, max_batch_tokens: of each worker.
    host_looks: a copy to or from host memory has ended when the engine has looked at it so often.
    delay_s, bytes_per_s: of a link between workers; None: nobody measured how many bytes it carries.
    speed: of a worker, as it says itself; None: it has measured nothing.
    misled: share of the placements that stand where the policy would not have them.
    num_asked: requests that come, beside those of rushes.
    histories: conversations that prompts may go on with.
    max_batch_in_hand: batch jobs beyond so many are put down.
    named_after_s: jobs that wait for longer are named in what ingest commits.
    has_faults: whether anything befalls the system.
    """

    age_s: float
    num_joining: int
    step_s: float
    num_pages: int
    num_host_pages: int
    host_looks: int
    max_batch_tokens: int
    delay_s: float
    bytes_per_s: float | None
    speed: SpeedProfile | None
    rules: Rules
    misled: float
    num_asked: int
    histories: tuple[list[int], ...]
    max_batch_in_hand: int
    named_after_s: float
    has_faults: bool

    def measured_steps(self, rng: Random) -> list[MeasuredStep]:
        """What a worker of these speeds, more or less, measured of itself before it opened."""
        if self.speed is None:
            return []
        factor = rng.choice((0.5, 1.0, 1.0, 2.0))
        works = [StepWork(num_rows=rows, num_context_tokens=64 * rows) for rows in (1, 4)]
        works += [StepWork(num_prompt_tokens=count, num_pairs=count * (count + 1) // 2) for count in (8, 64, 256)]
        return [MeasuredStep(work, factor * self.speed.step_s(work)) for work in works for _ in range(4)]


def draw_conditions(seed: int) -> Conditions:
    rng = Random(f"conditions {seed}")
    step_s = rng.choice((0.02, 0.1, 0.3))
    max_batch_tokens = rng.choice((64, 256))
    num_host_pages = rng.choice((0, 0, 0, 16, 64))
    num_histories = 3 if num_host_pages else rng.choice((0, 1, 1, 2))
    speed = SpeedProfile(step_s, 0.0, 0.0, step_s / max_batch_tokens, 0.0) if rng.random() < 0.6 else None
    return Conditions(
        age_s=AGED_S if rng.random() < 0.15 else 0.0,
        num_joining=rng.choice((0, 0, 1, 2)),
        step_s=step_s,
        num_pages=rng.choice((8, 8, 12) if num_host_pages else (12, 24)),
        num_host_pages=num_host_pages,
        host_looks=rng.choice((1, 2, 5)),
        max_batch_tokens=max_batch_tokens,
        delay_s=rng.choice((0.01, 0.01, 0.2)),
        bytes_per_s=rng.choice((None, 2e4, 1e6)),
        speed=speed,
        rules=Rules(
            ttft_goal_s=rng.choice((0.5, 2.0, 10.0)),
            tpot_goal_s=rng.choice((0.03, 0.1, 1.0)),
            local_prefill=rng.random() < 0.6,
            fetch=rng.random() < 0.8,
        ),
        misled=rng.choice((0.0, 0.0, 0.3, 1.0)),
        num_asked=rng.randint(8, 12) if num_host_pages else rng.randint(3, 6),
        histories=tuple([rng.randrange(3, 990) for _ in range(320)] for _ in range(num_histories)),
        max_batch_in_hand=rng.choice((1, 2, 1024)),
        named_after_s=rng.choice((0.5, low_water.NAMED_AFTER_S)),
        has_faults=rng.random() < 0.9,
    )


class Misled:
    """In the place of the policy: some of its placements stand elsewhere, with hints that may be wrong."""

    def __init__(self, conditions: Conditions, rng: Random) -> None:
        self._conditions = conditions
        self._rng = rng

    def __call__(
        self, request: RequestView, cluster: ClusterView, holders: Holders, rules: Rules, *, tie_break: int
    ) -> Decision:
        decision = place(request, cluster, holders, rules, tie_break=tie_break)
        rng = self._rng
        if not isinstance(decision, Chosen) or rng.random() >= self._conditions.misled:
            return decision
        chosen = replace(decision, explain=lambda: ELSEWHERE)
        prefill = [worker.ref for worker in cluster.prefill if worker.takes_work]
        if rules.local_prefill and (not prefill or rng.random() < 0.5):
            chosen = replace(chosen, prefill=chosen.decode, num_prefill_pages=0)
        elif prefill:
            num_pages = pages_for(request.num_tokens)
            chosen = replace(chosen, prefill=rng.choice(prefill), num_prefill_pages=num_pages)
        if rules.fetch and rng.random() < 0.7:
            anybody = [worker.ref for worker in (*cluster.prefill, *cluster.decode)]
            told = holders.matches(request.blocks)
            sources = [ref for ref in anybody if ref.incarnation in told and ref != chosen.prefill]
            source = rng.choice(sources if sources and rng.random() < 0.7 else anybody)
            chosen = replace(chosen, fetch=Fetch(source, rng.randint(1, 5)))
        return chosen


PLAIN = Conditions(
    age_s=0.0,
    num_joining=0,
    step_s=0.05,
    num_pages=24,
    num_host_pages=0,
    host_looks=1,
    max_batch_tokens=256,
    delay_s=0.01,
    bytes_per_s=None,
    speed=None,
    rules=Rules(ttft_goal_s=2.0, tpot_goal_s=0.1, local_prefill=False),
    misled=0.0,
    num_asked=5,
    histories=(),
    max_batch_in_hand=1024,
    named_after_s=low_water.NAMED_AFTER_S,
    has_faults=False,
)
"""With nothing new in them."""


@contextmanager
def set_up(conditions: Conditions, rng: Random) -> Iterator[None]:
    """Ingest under these conditions, while the context is open."""
    with (
        patch.object(placer, "place", Misled(conditions, rng)),
        patch.object(ingest_service, "MAX_BATCH_IN_HAND", conditions.max_batch_in_hand),
        patch.object(low_water, "NAMED_AFTER_S", conditions.named_after_s),
    ):
        yield
