"""How much is measured."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """One run.

    Attributes:
        device: "cuda" or "cpu".
        tokens: prompt lengths of single pulls.
        num_warm, num_pulls, num_traced: pulls of each length that are not counted, that are, and that are looked into.
        at_once: pulls of 1024 tokens that begin together.
        idle_s: how long nothing happens.
        format_tokens: of the copies alone.
        shape: of the engines, see `benchmarks.engine.build.SHAPES`.
        batch, context, steps: of a decode phase.
        prompt_tokens, prompts: of a prefill phase.
        rounds: of phases with and without pulls, by turns.
        stream_tokens: of each pull that comes meanwhile.
        paced_gb_per_s: the slower stream.
        stream_at_once: pulls at a time of the stream that goes as fast as it can.
        max_stream_pulls: tickets that one phase gets at most.
    """

    device: str
    tokens: Sequence[int]
    num_warm: int
    num_pulls: int
    num_traced: int
    at_once: int
    idle_s: float
    format_tokens: int
    shape: str
    batch: int
    context: int
    steps: int
    prompt_tokens: int
    prompts: int
    rounds: int
    stream_tokens: int
    paced_gb_per_s: float
    stream_at_once: int
    max_stream_pulls: int

    @property
    def num_pages(self) -> int:
        """Pages at each end: more than travel, so that they lie scattered."""
        return max(self.tokens) // 64 * 5 // 4


FULL = Plan(
    device="cuda",
    tokens=(1024, 4096, 16384, 32768),
    num_warm=3,
    num_pulls=20,
    num_traced=5,
    at_once=8,
    idle_s=5.0,
    format_tokens=4096,
    shape="llama-3.1-8b",
    batch=64,
    context=1024,
    steps=150,
    prompt_tokens=2048,
    prompts=20,
    rounds=3,
    stream_tokens=1024,
    paced_gb_per_s=25.0,
    stream_at_once=2,
    max_stream_pulls=4000,
)

TRIAL = Plan(
    device="cpu",
    tokens=(1024, 4096),
    num_warm=1,
    num_pulls=3,
    num_traced=2,
    at_once=4,
    idle_s=0.2,
    format_tokens=256,
    shape="tiny",
    batch=2,
    context=30,
    steps=10,
    prompt_tokens=100,
    prompts=4,
    rounds=1,
    stream_tokens=128,
    paced_gb_per_s=0.01,
    stream_at_once=2,
    max_stream_pulls=60,
)
"""To see on a CPU that it can be measured."""
