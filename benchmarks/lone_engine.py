"""`python -m benchmarks.lone_engine`: holds served answers against one engine alone, in a process of its own.

Reads a JSON object with the fields of `Task` from standard input and writes what it found as JSON.

Two computations of the same prompt in bf16 differ in the last bits where their batches have other shapes, and so a
token differs where the two best logits lie closer than that. So the engine computes each answer greedily; where the
served token is another one, its log probability must be within `margin` of the best one's, and the engine goes on from
the served token. Each served token is thus checked against the engine's choice after the same prefix. Tokens are told
apart by their text, as the edge gives no ids; only halves of characters share one.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from shared.blocks import token_ids
from shared.engine.engine import PagedEngine
from shared.engine.port import EngineRequest, TokenOutput
from shared.request import FinishReason, SamplingParams
from shared.text.tokeniser import Tokeniser
from shared.worker.process import build_engine
from shared.worker.settings import WorkerSettings

RIVALS = 5


@dataclass(frozen=True, slots=True)
class Task:
    """What to compare.

    Attributes:
        prompts: token ids.
        answers: of each prompt the texts of the served tokens, one by one.
        margin: natural log units, which equal logit units.
    """

    model: str
    device: str
    dtype: Literal["float32", "bfloat16"]
    num_pages: int
    prompts: list[list[int]]
    answers: list[list[str]]
    margin: float


@dataclass(frozen=True, slots=True)
class Difference:
    """A served token that is not the engine's.

    Attributes:
        gap: how far its log probability is below the best; None if it is not among the likeliest.
    """

    prompt_tokens: int
    index: int
    served: str
    expected: str
    gap: float | None


def generate(
    engine: PagedEngine, key: str, prompt: Sequence[int], answer: Sequence[int], max_tokens: int
) -> list[TokenOutput]:
    """The engine's greedy tokens behind `prompt` and `answer`, up to `max_tokens` of answer in all."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=RIVALS)
    engine.add(EngineRequest(key=key, ids=token_ids([*prompt, *answer]), prompt_len=len(prompt), sampling=sampling))
    outputs: list[TokenOutput] = []
    while engine.has_work():
        outputs += engine.step().tokens
    failed = [output.error for output in outputs if output.finish is FinishReason.FAILED]
    if failed:
        raise RuntimeError(f"the lone engine failed: {failed[0]}")
    return outputs


def compare(
    engine: PagedEngine, tokeniser: Tokeniser, key: str, prompt: Sequence[int], served: Sequence[str], margin: float
) -> list[Difference]:
    """Where one served answer is not the engine's; ends at the first token that is out of the margin."""
    answer: list[int] = []
    differences: list[Difference] = []
    while len(answer) < len(served):
        for output in generate(engine, f"{key}-{len(answer)}", prompt, answer, len(served)):
            text = served[len(answer)]
            if tokeniser.token_text(output.token_id) == text:
                answer.append(output.token_id)
                continue
            difference, token_id = _difference(output, tokeniser, len(prompt), text)
            differences.append(difference)
            if difference.gap is None or difference.gap > margin:
                return differences
            answer.append(token_id)
            break
    return differences


def _difference(output: TokenOutput, tokeniser: Tokeniser, prompt_tokens: int, served: str) -> tuple[Difference, int]:
    assert output.logprob is not None
    best = output.logprob.logprob
    rivals = [(token, logprob) for token, logprob in output.logprob.top if tokeniser.token_text(token) == served]
    expected = tokeniser.token_text(output.token_id)
    token_id, gap = (rivals[0][0], best - rivals[0][1]) if rivals else (-1, None)
    return Difference(prompt_tokens, output.index, served, expected, gap), token_id


def check(task: Task) -> Mapping[str, object]:
    """Compares all answers."""
    settings = WorkerSettings(model=Path(task.model), device=task.device, dtype=task.dtype, num_pages=task.num_pages)
    engine = build_engine(settings)
    tokeniser = Tokeniser.load(Path(task.model))
    found = [
        compare(engine, tokeniser, str(index), prompt, answer, task.margin)
        for index, (prompt, answer) in enumerate(zip(task.prompts, task.answers, strict=True))
    ]
    differences = [difference for each in found for difference in each]
    ties = [each.gap for each in differences if each.gap is not None and each.gap <= task.margin]
    wrong = [each for each in differences if each.gap is None or each.gap > task.margin]
    return {
        "prompts": len(task.prompts),
        "tokens": sum(len(answer) for answer in task.answers),
        "answers_equal": sum(not each for each in found),
        "ties": len(ties),
        "tie_gaps": sorted(round(gap, 4) for gap in ties),
        "margin": task.margin,
        "wrong": [asdict(difference) for difference in wrong],
    }


def main() -> None:
    """Command line."""
    json.dump(check(Task(**json.load(sys.stdin))), sys.stdout)


if __name__ == "__main__":
    main()
