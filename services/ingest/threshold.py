"""From which length on prompts are handed over, for people: placements weigh each prompt by itself."""

from shared.policy.placement import Rules, local_threshold_tokens
from shared.policy.views import ClusterView


def local_threshold(view: ClusterView, rules: Rules, expected_new_tokens: float) -> int | None:
    """Uncached prompt tokens below which a decode worker had better compute a prompt itself, with both pools' least
    loaded workers; None while a pool is empty."""
    prefill = min(view.prefill, key=lambda worker: (worker.queued_prefill_s, worker.ref.slot), default=None)
    decode = min(view.decode, key=lambda worker: (worker.num_context_tokens, worker.ref.slot), default=None)
    if prefill is None or decode is None:
        return None
    return local_threshold_tokens(prefill, decode, rules, expected_new_tokens=expected_new_tokens)
