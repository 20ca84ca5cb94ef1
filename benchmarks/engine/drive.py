"""Work for an engine: random prompts, requests, and steps of exactly so many decode rows."""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count

import numpy as np

from shared.blocks import TokenIds, token_ids
from shared.engine.port import Engine, EngineRequest, TokenOutput
from shared.request import FinishReason, SamplingParams

MAX_IDLE_STEPS = 10_000


def greedy(num_tokens: int) -> SamplingParams:
    """Exactly `num_tokens` tokens, each the likeliest."""
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


class Work:
    """Makes requests of random prompts. No two share a block, so no prefix is ever found."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._vocab_size = vocab_size
        self._keys: Iterator[int] = count()

    def prompt(self, num_tokens: int) -> TokenIds:
        ids = self._rng.integers(0, self._vocab_size, num_tokens, dtype=np.int32)
        return token_ids(ids.tolist())

    def requests(self, number: int, num_tokens: int, sampling: SamplingParams) -> list[EngineRequest]:
        """`number` prompts of `num_tokens` tokens each."""
        return [
            EngineRequest(key=self.key(), ids=self.prompt(num_tokens), prompt_len=num_tokens, sampling=sampling)
            for _ in range(number)
        ]

    def key(self) -> str:
        return f"r{next(self._keys)}"


def run_all(
    engine: Engine, requests: Iterable[EngineRequest], on_token: Callable[[TokenOutput], None] = lambda _: None
) -> float:
    """Seconds from the first `add` to the last token. Raises RuntimeError if a request fails."""
    began_s = time.perf_counter()
    for request in requests:
        engine.add(request)
    num_idle_steps = 0
    while engine.has_work():
        output = engine.step()
        for token in output.tokens:
            if token.finish is FinishReason.FAILED:
                raise RuntimeError(f"request {token.key} failed: {token.error}")
            on_token(token)
        num_idle_steps = 0 if output.tokens or output.num_batch_tokens else num_idle_steps + 1
        if num_idle_steps > MAX_IDLE_STEPS:
            raise RuntimeError(f"the engine has work and does none of it: {engine.stats()}")
    return time.perf_counter() - began_s


class DecodeRows:
    """So many rows that decode from the same context on, without any prefill before them.

    Their KV counts as imported: what the pages happen to hold. Ends with `close`.
    """

    def __init__(self, engine: Engine, work: Work, batch: int, context: int, sampling: SamplingParams) -> None:
        self._engine = engine
        self.keys: list[str] = []
        for _ in range(batch):
            request = EngineRequest(key=work.key(), ids=work.prompt(context), prompt_len=context, sampling=sampling)
            if engine.reserve(request) is None:
                raise RuntimeError(f"{batch} rows of {context} tokens do not fit: {engine.stats()}")
            engine.imported(request.key, work.prompt(1)[0])
            self.keys.append(request.key)

    def steps(self, number: int) -> float:
        """Seconds of each of `number` full steps, in the mean."""
        began_s = time.perf_counter()
        for _ in range(number):
            output = self._engine.step()
            if len(output.tokens) < len(self.keys):
                raise RuntimeError(f"a step gave {len(output.tokens)} tokens of {len(self.keys)}")
        return (time.perf_counter() - began_s) / number

    def close(self) -> None:
        """Forget the rows, and let a batch in flight end."""
        for key in self.keys:
            self._engine.abort(key)
        while self._engine.has_work():
            self._engine.step()
