"""Choosing workers for one choice, and taking their credits: what the view promises, the store may refuse."""

from collections.abc import Callable
from dataclasses import dataclass

from services.ingest.cluster import Cluster
from services.ingest.lengths import Lengths
from services.ingest.threshold import local_threshold
from services.ingest.work import Placed, Waiting
from shared.blocks import BlockHash, hash_chain, root_hash
from shared.observe.metrics import IngestMetrics
from shared.policy.admission import Outlook, Usual
from shared.policy.idle_capacity import leaves_others_alone, needed_quiet_s
from shared.policy.placement import Chosen, Decision, NeverFits, NoRoomNow, Rules, capacity_tokens, place
from shared.policy.views import ClusterView, RequestView
from shared.request import PlacementId
from shared.state import keys
from shared.state.port import Placement, PlacementKey, State

NUM_HASHED = 16
"""Prompts whose blocks' hashes are kept: those that are tried again and again."""


@dataclass(frozen=True, slots=True)
class Others:
    """Those who are not batch, at all ingests: what a batch job must know of them.

    Attributes:
        quiet_s: for which none has come.
        somebody_waits: for room, elsewhere.
    """

    quiet_s: float
    somebody_waits: bool


@dataclass(frozen=True, slots=True)
class TooBusy:
    """A batch job that may start once nobody has come for so long."""

    quiet_s: float


class Placer:
    """Args:
    rules: what placements aim at.
    clock_s: unix seconds.
    """

    def __init__(
        self,
        state: State,
        cluster: Cluster,
        lengths: Lengths,
        rules: Rules,
        *,
        clock_s: Callable[[], float],
        new_placement_id: Callable[[], PlacementId],
        metrics: IngestMetrics,
    ) -> None:
        self._state = state
        self._cluster = cluster
        self._lengths = lengths
        self._rules = rules
        self._clock_s = clock_s
        self._new_placement_id = new_placement_id
        self._metrics = metrics
        self._usual: Usual | None = None
        self._num_placed = 0
        self._hashed: dict[tuple[PlacementKey, str], tuple[BlockHash, ...]] = {}

    async def place(self, waiting: Waiting, others: Others) -> Placed | NeverFits | TooBusy | None:
        """None: there is no room for it now. Raises StateUnavailable."""
        if (placed := await self.place_at_once(waiting, others)) is not None:
            return placed
        decision = self._decide(await self._cluster.refresh(), waiting, others)
        if isinstance(decision, Chosen):
            return await self._take_credits(waiting, decision)
        # It may be placed already, by an ingest that died or by a call whose answer was lost, and what leaves no room
        # may be its own credits: nobody else would ever give them back.
        if (standing := await self.standing(waiting)) is not None:
            return standing
        return None if isinstance(decision, NoRoomNow) else decision

    async def place_at_once(self, waiting: Waiting, others: Others) -> Placed | None:
        """Place without asking who is there: whether a worker still takes it is the store's to say."""
        view = self._cluster.recent()
        if view is None:
            return None
        decision = self._decide(view, waiting, others)
        return await self._take_credits(waiting, decision) if isinstance(decision, Chosen) else None

    async def standing(self, waiting: Waiting) -> Placed | None:
        """Where it was placed already, if it was. Raises StateUnavailable."""
        placement = await self._state.find_placement(_key(waiting))
        return None if placement is None else Placed(placement, None)

    async def take_back(self, waiting: Waiting) -> None:
        """It has ended: whoever placed it, if anybody did, may not have been able to tell its workers."""
        standing = await self._state.find_placement(_key(waiting))
        if standing is not None:
            for worker in {standing.prefill, standing.decode}:
                await self._state.give_back(standing.id, worker.incarnation)

    def may_fit(self, waiting: Waiting) -> bool:
        """Whether some worker is large enough, for all that is known."""
        admitted = waiting.admitted
        limit_tokens = capacity_tokens(admitted.spec.model, self._cluster.view)
        return limit_tokens is None or len(admitted.prompt_ids) + admitted.sampling.max_tokens <= limit_tokens

    def outlook(self) -> Outlook | None:
        """What awaits who comes now; None while that is not known."""
        if self._usual is None:
            return None
        return Outlook.of(self._cluster.view, self._usual, local_prefill=self._rules.local_prefill)

    def local_threshold(self) -> int | None:
        """See `threshold`, for choices such as those placed lately; None before there were any."""
        if self._usual is None:
            return None
        return local_threshold(self._cluster.view, self._rules, self._usual.num_new_tokens)

    def _decide(self, view: ClusterView, waiting: Waiting, others: Others) -> Decision | TooBusy:
        decision = place(
            self._request_view(waiting), view, self._cluster.holders, self._rules, tie_break=self._num_placed
        )
        if waiting.is_batch and isinstance(decision, Chosen):
            return self._if_idle(decision, view, others)
        return decision

    def _if_idle(self, chosen: Chosen, view: ClusterView, others: Others) -> Chosen | NoRoomNow | TooBusy:
        """For a batch job."""
        needed_s = needed_quiet_s(chosen, self._rules)
        if others.quiet_s < needed_s:
            return TooBusy(needed_s)
        if others.somebody_waits or not leaves_others_alone(chosen, view, self._rules, quiet_s=others.quiet_s):
            return NoRoomNow()
        return chosen

    def _request_view(self, waiting: Waiting) -> RequestView:
        admitted = waiting.admitted
        expected = self._lengths.expect(waiting)
        return RequestView(
            request_id=admitted.job.request_id,
            choice=waiting.choice,
            model=admitted.spec.model,
            num_tokens=waiting.num_ids,
            max_new_tokens=admitted.sampling.max_tokens - len(waiting.accepted_ids),
            expected_new_tokens=expected.new_tokens,
            usual_new_tokens=self._lengths.usual_tokens(),
            reserve_new_tokens=expected.reserve_tokens,
            blocks=self._blocks(waiting),
        )

    def _blocks(self, waiting: Waiting) -> tuple[BlockHash, ...]:
        """Hashes of its full blocks; kept while it is asked about again and again, as those near the front are."""
        fingerprint = self._cluster.fingerprints.get(waiting.admitted.spec.model, "")
        key = (_key(waiting), fingerprint)
        blocks = self._hashed.get(key)
        if blocks is None:
            root = root_hash(fingerprint, waiting.admitted.cache_salt)
            blocks = self._hashed[key] = tuple(hash_chain(root, waiting.ids))
            if len(self._hashed) > NUM_HASHED:
                del self._hashed[next(iter(self._hashed))]
        return blocks

    async def _take_credits(self, waiting: Waiting, chosen: Chosen) -> Placed | None:
        job = waiting.admitted.job
        wanted = Placement(self._new_placement_id(), chosen.prefill, chosen.decode)
        placement = await self._state.place(
            _key(waiting),
            wanted,
            num_prefill_pages=chosen.num_prefill_pages,
            num_decode_pages=chosen.num_decode_pages,
            prefill_s=chosen.prefill_s,
            keep_ms=max(int((job.deadline_s - self._clock_s()) * 1000), keys.LEASE_MS),
        )
        if placement is None:
            return None
        self._num_placed += 1
        if placement != wanted:  # an earlier one, whose credits the view has already
            return Placed(placement, None)
        self._metrics.placed.inc()
        self._cluster.count(chosen)
        self._note(waiting, chosen)
        return Placed(placement, chosen, self._cluster.fetch_ticket(chosen))

    def _note(self, waiting: Waiting, chosen: Chosen) -> None:
        """What is usual, for the outlook."""
        prefill_s = 0.0 if chosen.prefill == chosen.decode else chosen.prefill_s
        one = Usual(chosen.num_decode_pages, self._lengths.expect(waiting).new_tokens, prefill_s)
        self._usual = one if self._usual is None else self._usual.with_one_more(one)


def _key(waiting: Waiting) -> PlacementKey:
    return PlacementKey(waiting.admitted.job.request_id, waiting.choice, waiting.epoch)
