"""`python -m benchmarks.lengths TRACE...`: how well answers' lengths are predicted, on whole traces in order, as JSON.

Each request is predicted by what ended before it, then learnt. A trace is one tenant; with `--together` all traces are
one stream in the order of their times, each still a tenant. Answers end as soon as they are asked for here; in a system
they end later, and a prediction knows the last of them less well.

A quantile covers an answer that is no longer than it: of q of them, if it is calibrated.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.control_plane.machine import commit, machine
from loadgen.traces import read_trace
from shared.policy.lengths import LengthKey, LengthPredictor

QUANTILES = (0.5, 0.75, 0.9, 0.99)
BUCKET_QUANTILE = 0.9
NO_LIMIT = 2**20


class Answer(NamedTuple):
    """One request of a trace."""

    at_s: float
    tenant: str
    num_prompt_tokens: int
    num_tokens: int


@dataclass(slots=True)
class Score:
    """What became of the predictions.

    Attributes:
        num_covered: by quantile.
        by_prompt: (answers, covered by BUCKET_QUANTILE) by the largest power of two in the prompt's length.
        mean_error: sum of the predicted means over the sum of the lengths, less 1.
    """

    num: int = 0
    num_covered: dict[float, int] = field(default_factory=lambda: dict.fromkeys(QUANTILES, 0))
    by_prompt: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    num_tokens: int = 0
    num_expected: float = 0.0

    def summary(self) -> dict[str, Any]:
        return {
            "num": self.num,
            "covered": {str(q): round(count / self.num, 4) for q, count in self.num_covered.items()},
            f"covered_{BUCKET_QUANTILE}_by_prompt_tokens": {
                str(length): {"num": num, "covered": round(covered / num, 3)}
                for length, (num, covered) in sorted(self.by_prompt.items())
            },
            "mean_error": round(self.num_expected / self.num_tokens - 1, 4),
        }


def score(answers: Iterable[Answer]) -> dict[str, Any]:
    """Predict and learn each in turn."""
    predictor = LengthPredictor()
    scores: dict[str, Score] = defaultdict(Score)
    for answer in answers:
        key = LengthKey(answer.tenant, "model", "completion", answer.num_prompt_tokens)
        prediction = predictor.predict(key, NO_LIMIT)
        of_tenant = scores[answer.tenant]
        of_tenant.num += 1
        of_tenant.num_tokens += answer.num_tokens
        of_tenant.num_expected += prediction.mean
        for q in QUANTILES:
            of_tenant.num_covered[q] += answer.num_tokens <= prediction.quantile(q)
        bucket = of_tenant.by_prompt[1 << (max(answer.num_prompt_tokens, 1).bit_length() - 1)]
        bucket[0] += 1
        bucket[1] += answer.num_tokens <= prediction.quantile(BUCKET_QUANTILE)
        predictor.observe(key, answer.num_tokens, is_cut=False)
    return {tenant: each.summary() for tenant, each in scores.items()}


def costs(answers: Sequence[Answer]) -> dict[str, float]:
    """Microseconds of this thread's time for one observation, and for one prediction with a quantile and the mean."""
    keyed = [(LengthKey(a.tenant, "model", "completion", a.num_prompt_tokens), a.num_tokens) for a in answers]
    taken: list[float] = []
    for predicts in (False, True):
        predictor = LengthPredictor()
        began_s = time.thread_time()
        for key, num_tokens in keyed:
            if predicts:
                prediction = predictor.predict(key, NO_LIMIT)
                _ = prediction.quantile(0.75), prediction.mean
            predictor.observe(key, num_tokens, is_cut=False)
        taken.append((time.thread_time() - began_s) / len(keyed) * 1e6)
    return {"observe_us": round(taken[0], 2), "predict_us": round(taken[1] - taken[0], 2)}


def read(trace: Path) -> list[Answer]:
    """The requests of a trace, under its file's name."""
    return [Answer(row.at_s, trace.stem, row.input_tokens, row.output_tokens) for row in read_trace(trace)]


def main(
    traces: Annotated[list[Path], typer.Argument(help="Mooncake jsonl or Azure csv files.")],
    *,
    together: Annotated[bool, typer.Option(help="All traces as one stream.")] = False,
) -> None:
    """Print how well lengths are predicted."""
    streams = [read(trace) for trace in traces]
    everything = sorted(answer for stream in streams for answer in stream)
    report = {"machine": machine(), "commit": commit(), "together": together, "cost": costs(everything)}
    scored = [score(everything)] if together else [score(stream) for stream in streams]
    typer.echo(json.dumps(report | {name: each for scores in scored for name, each in scores.items()}, indent=1))


if __name__ == "__main__":
    typer.run(main)
