"""How long answers will be, as placements are told."""

from typing import NamedTuple, Protocol

from loadgen.simulator.workload import SimRow
from shared.policy.lengths import LengthKey, LengthPredictor, expect

PLAIN_TOKENS = 256
"""What every answer is taken for without prediction."""


class Asked(NamedTuple):
    """What a request allows its answer."""

    at_least: int
    at_most: int


class Lengths(Protocol):
    """Predicts answers, and hears how long they were."""

    def predict(self, row: SimRow, asked: Asked) -> tuple[float, int]:
        """Expected tokens, and tokens to keep room for."""
        ...

    def usual(self) -> float:
        """Tokens of any answer, on average."""
        ...

    def learn(self, row: SimRow, asked: Asked) -> None:
        """The row's answer has ended."""
        ...


class PlainLengths:
    """Takes every answer for PLAIN_TOKENS long."""

    def predict(self, row: SimRow, asked: Asked) -> tuple[float, int]:
        del row
        plain = min(PLAIN_TOKENS, asked.at_most)
        return float(plain), plain

    def usual(self) -> float:
        return float(PLAIN_TOKENS)

    def learn(self, row: SimRow, asked: Asked) -> None:
        """Nothing is learnt."""


class LearntLengths:
    """As ingest learns: from answers as they end; a trace is a tenant."""

    def __init__(self) -> None:
        self._predictor = LengthPredictor()

    def predict(self, row: SimRow, asked: Asked) -> tuple[float, int]:
        expected = expect(self._predictor.predict(_key(row), asked.at_most), at_least=asked.at_least)
        return expected.new_tokens, expected.reserve_tokens

    def usual(self) -> float:
        return self._predictor.usual_tokens()

    def learn(self, row: SimRow, asked: Asked) -> None:
        self._predictor.observe(_key(row), row.num_output, is_cut=row.num_output >= asked.at_most)


def _key(row: SimRow) -> LengthKey:
    return LengthKey(row.source, "simulated", "completion", row.num_input)
