"""What the rows are held against, by shape: vLLM 0.26.0, the hardware's limit and our aim, all on one H200 in bf16.

vLLM ran FA3, torch.compile and CUDA graphs, offline, greedy, without prefix cache, with random weights. A limit is the
larger of weights and KV over 4.3 TB/s and of the matrix products over 787 TFLOP/s, the head on last rows only.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Peer:
    """In the row's own unit; None where nobody said."""

    vllm: float | None
    limit: float | None
    aim: float | None


PEERS: Mapping[str, Mapping[str, Peer]] = {
    "llama-3.1-8b": {
        "first token, 128": Peer(15.7, 3.5, 8),
        "first token, 512": Peer(17.6, 9.2, 14),
        "first token, 2048": Peer(52.6, 37.7, 47),
        "first token, 8192": Peer(216, 168, 205),
        "prefill 16 × 4096": Peer(41_300, 52_400, 43_000),
        "prefill 64 × 1024": Peer(43_500, 55_300, 45_000),
        "decode step, 1 × 1024": Peer(4.93, 3.5, 4.2),
        "decode step, 16 × 1024": Peer(5.63, 4.0, 4.8),
        "decode step, 64 × 1024": Peer(7.66, 5.6, 6.6),
        "decode step, 256 × 1024": Peer(18.2, 13.4, 15.7),
        "decode step, 64 × 4096": Peer(13.8, 11.6, 12.9),
        "512 × 1024 → 256": Peer(6_274, 7_900, 6_900),
        "start to ready": Peer(196, None, 20),
    },
    "llama-3.2-1b": {
        "first token, 128": Peer(10.9, 0.6, 3),
        "first token, 512": Peer(10.5, 1.3, 4),
        "first token, 2048": Peer(18.5, 5.4, 9),
        "first token, 8192": Peer(44.1, 26, 37),
        "prefill 16 × 4096": Peer(248_000, None, None),
        "prefill 64 × 1024": Peer(261_000, 391_000, 290_000),
        "decode step, 1 × 1024": Peer(1.96, 0.58, 1.2),
        "decode step, 16 × 1024": Peer(2.05, 0.71, 1.3),
        "decode step, 64 × 1024": Peer(3.29, 1.1, 1.9),
        "decode step, 256 × 1024": Peer(8.58, 2.9, 4.6),
        "decode step, 64 × 4096": Peer(4.19, 2.6, 3.6),
        "512 × 1024 → 256": Peer(26_214, 45_000, 34_000),
    },
}

BOUNDS: Mapping[str, float] = {
    "mixed step over its parts": 1.15,
    "first request after ready": 1.5,
    "filters": 3,
    "penalties": 10,
    "logprobs": 10,
}
"""Highest values of what is held against nobody, in the row's own unit."""
