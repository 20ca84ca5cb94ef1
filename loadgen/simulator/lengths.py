"""How long answers will be, as placements are told."""

from typing import Protocol

from loadgen.simulator.workload import SimRow
from shared.policy.lengths import LengthKey, LengthPredictor, expect

PLAIN_TOKENS = 256
"""What every answer is taken for without prediction."""


class Lengths(Protocol):
    """Predicts answers, and hears how long they were."""

    def predict(self, row: SimRow, max_new_tokens: int) -> tuple[float, int]:
        """Expected tokens, and tokens to keep room for."""
        ...

    def learn(self, row: SimRow, num_tokens: int) -> None:
        """An answer had so many tokens."""
        ...


class PlainLengths:
    """Takes every answer for PLAIN_TOKENS long."""

    def predict(self, row: SimRow, max_new_tokens: int) -> tuple[float, int]:
        del row
        plain = min(PLAIN_TOKENS, max_new_tokens)
        return float(plain), plain

    def learn(self, row: SimRow, num_tokens: int) -> None:
        """Nothing is learnt."""


class LearntLengths:
    """As ingest learns: from answers as they end; a trace is a tenant."""

    def __init__(self) -> None:
        self._predictor = LengthPredictor()

    def predict(self, row: SimRow, max_new_tokens: int) -> tuple[float, int]:
        expected = expect(self._predictor.predict(_key(row), max_new_tokens))
        return expected.new_tokens, expected.reserve_tokens

    def learn(self, row: SimRow, num_tokens: int) -> None:
        self._predictor.observe(_key(row), num_tokens, is_cut=False)


def _key(row: SimRow) -> LengthKey:
    return LengthKey(row.source, "simulated", "completion", row.num_input)
