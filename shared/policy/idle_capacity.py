"""Whether a batch job may start: only where it leaves the goals of all others alone, for it cannot be taken off again.

Nobody else may wait. What is left must do for those who come next while it runs: with it in,

- a token of the decode worker takes no longer than TPOT_SHARE of the goal, and SPARE of its pages and places stay free.
  Where nobody is it may take all: a worker that is too slow for the goal by itself would never have a batch job;
- a prompt that came now would wait no longer than TTFT_SHARE of the goal for its prefill. A prompt that takes longer
  than that by itself starts where no other work is queued, once nobody has come for as long as it takes: what came
  lately is the best guess of what comes.
"""

from shared.blocks import PAGE_TOKENS
from shared.policy.costs import mean_profile
from shared.policy.placement import Chosen, Rules
from shared.policy.profile import SpeedProfile
from shared.policy.views import ClusterView, WorkerView
from shared.request import WorkerRef

TPOT_SHARE = 0.8
TTFT_SHARE = 0.5
SPARE = 0.25


def leaves_others_alone(chosen: Chosen, cluster: ClusterView, rules: Rules, *, quiet_s: float) -> bool:
    """Whether a batch job may run as `chosen`.

    Args:
        quiet_s: for which nobody but batch has come.
    """
    decode = _found(cluster.decode, chosen.decode)
    prefill = decode if chosen.prefill == chosen.decode else _found(cluster.prefill, chosen.prefill)
    if decode is None or prefill is None:
        return False
    profile = decode.profile or mean_profile(cluster.decode, cluster.prefill)
    has_room = decode.num_credits == 0 or _leaves_room(decode, profile, chosen, rules)
    return has_room and _is_soon(prefill, chosen, rules, quiet_s)


def needed_quiet_s(chosen: Chosen, rules: Rules) -> float:
    """For how long nobody but batch must have come before a batch job may run as `chosen`, whatever room there is."""
    return chosen.prefill_s if chosen.prefill_s > TTFT_SHARE * rules.ttft_goal_s else 0.0


def _leaves_room(decode: WorkerView, profile: SpeedProfile, chosen: Chosen, rules: Rules) -> bool:
    """Beside those who are there."""
    num_context_tokens = decode.num_context_tokens + chosen.num_decode_pages * PAGE_TOKENS
    num_pages, num_rows = decode.num_credit_pages + chosen.num_decode_pages, decode.num_credits + 1
    return (
        profile.decode_step_s(num_rows, num_context_tokens) <= TPOT_SHARE * rules.tpot_goal_s
        and num_pages <= (1 - SPARE) * decode.num_pages
        and num_rows <= (1 - SPARE) * decode.max_running
    )


def _is_soon(prefill: WorkerView, chosen: Chosen, rules: Rules, quiet_s: float) -> bool:
    if prefill.queued_prefill_s + chosen.prefill_s <= TTFT_SHARE * rules.ttft_goal_s:
        return True
    return prefill.queued_prefill_s == 0 and quiet_s >= needed_quiet_s(chosen, rules) > 0


def _found(pool: tuple[WorkerView, ...], ref: WorkerRef) -> WorkerView | None:
    return next((worker for worker in pool if worker.ref == ref), None)
