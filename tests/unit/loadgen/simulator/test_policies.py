from loadgen.simulator.policies import Goals, contender
from shared.policy.holders import Holders
from shared.policy.profile import LinkRate
from shared.policy.views import ClusterView
from tests.unit.shared.policy.views import a_request, a_worker

GOALS = Goals(2.0, 0.1)
LINK = LinkRate(latency_s=1e-3, bytes_per_s=1e11)


def test_without_co_scheduling_decode_is_chosen_by_load_alone():
    request = a_request(num_tokens=1024)
    fuller = a_worker(2, num_credits=1, num_credit_pages=10, num_context_tokens=640)
    cluster = ClusterView((a_worker(0),), (a_worker(1), fuller))
    holders = Holders()
    holders.update(fuller.ref.incarnation, 0, request.blocks, ())

    def decode_of(name):
        return contender(name, GOALS, 0).policy.decide(request, cluster, holders, tie_break=0).decode.slot

    assert decode_of("ours") == 2, "nothing is to be computed there"
    assert decode_of("no-co-scheduling") == 1


def test_without_co_scheduling_the_others_still_lend():
    request = a_request(num_tokens=64_000, max_new_tokens=64)
    fuller = a_worker(2, num_credits=1, num_credit_pages=10, num_pages=2000, num_context_tokens=640, max_context=70_000)
    empty = a_worker(1, links={fuller.ref.incarnation: LINK}, num_pages=2000, max_context=70_000)
    cluster = ClusterView((a_worker(0, num_pages=2000, max_context=70_000, queued_prefill_s=5.0),), (empty, fuller))
    holders = Holders()
    holders.update(fuller.ref.incarnation, 0, request.blocks[:900], ())
    chosen = contender("no-co-scheduling", GOALS, 0).policy.decide(request, cluster, holders, tie_break=0)
    assert (chosen.prefill.slot, chosen.decode.slot, chosen.fetch.source.slot) == (1, 1, 2)
