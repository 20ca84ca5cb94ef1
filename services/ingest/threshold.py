"""From which length on prompts are handed over, for people: placements weigh each prompt by itself."""

from shared.policy.placement import Rules, local_threshold_tokens
from shared.policy.views import ClusterView, WorkerView


def local_threshold(view: ClusterView, rules: Rules, expected_new_tokens: float) -> int | None:
    """Uncached prompt tokens below which the least loaded decode worker had better compute a prompt itself than leave
    it to the least loaded prefill worker that may hand over to it; None while there are no two such."""
    decode = min(view.decode, key=lambda worker: (worker.num_context_tokens, worker.ref.slot), default=None)
    if decode is None:
        return None
    prefill = min(
        (worker for worker in view.prefill if _may_hand_over(worker, decode)),
        key=lambda worker: (worker.queued_prefill_s, worker.ref.slot),
        default=None,
    )
    if prefill is None:
        return None
    return local_threshold_tokens(prefill, decode, rules, expected_new_tokens=expected_new_tokens)


def _may_hand_over(prefill: WorkerView, decode: WorkerView) -> bool:
    return (prefill.model, prefill.layout_fingerprint) == (decode.model, decode.layout_fingerprint)
