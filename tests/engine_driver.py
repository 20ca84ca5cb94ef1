"""Runs an engine step by step, checks what must hold after each, and keeps what came out."""

from collections import defaultdict

from shared.blocks import BlockHash, TokenIds
from shared.engine.engine import PagedEngine
from shared.engine.port import EngineRequest, StepOutput, TokenOutput
from shared.request import FinishReason, SamplingParams


def greedy(max_tokens: int, **changes) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **changes)


def request(key: str, ids: TokenIds, sampling: SamplingParams, **changes) -> EngineRequest:
    """A request whose ids are all prompt, unless `prompt_len` says otherwise."""
    return EngineRequest(key=key, ids=ids, sampling=sampling, **{"prompt_len": len(ids), **changes})


class Driver:
    """An engine and the history of its outputs."""

    def __init__(self, engine: PagedEngine) -> None:
        self.engine = engine
        self.outputs: dict[str, list[TokenOutput]] = defaultdict(list)
        self.started: list[str] = []
        self.batch_sizes: list[int] = []
        self.blocks: set[BlockHash] = set()

    def step(self) -> StepOutput:
        output = self.engine.step()
        self.engine.check()
        keys = [token.key for token in output.tokens]
        assert len(set(keys)) == len(keys), "two tokens of one request in one step"
        assert output.num_batch_tokens <= self.engine.limits.max_batch_tokens
        for token in output.tokens:
            before = self.outputs[token.key]
            assert not before or (before[-1].finish is None and token.index == before[-1].index + 1)
            assert (token.num_cached_tokens is None) == bool(before), "cached tokens belong to the first output"
            before.append(token)
        self.started += output.started
        self.batch_sizes.append(output.num_batch_tokens)
        changes = self.engine.take_block_changes()
        assert not self.blocks & set(changes.stored)
        assert set(changes.evicted) <= self.blocks
        self.blocks = (self.blocks | set(changes.stored)) - set(changes.evicted)
        return output

    def run(self, max_steps: int = 3000) -> None:
        """Step until there is nothing left to compute."""
        for _ in range(max_steps):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError(f"still busy after {max_steps} steps: {self.engine.stats()}")

    def serve(self, *requests: EngineRequest) -> list[list[int]]:
        """The answers of requests that are added at once."""
        for each in requests:
            self.engine.add(each)
        self.run()
        return [self.tokens(each.key) for each in requests]

    def tokens(self, key: str) -> list[int]:
        return [output.token_id for output in self.outputs[key]]

    def finish(self, key: str) -> FinishReason | None:
        return self.outputs[key][-1].finish

    def num_cached_tokens(self, key: str) -> int | None:
        return self.outputs[key][0].num_cached_tokens

    def assert_all_free(self) -> None:
        self.engine.check()
        stats = self.engine.stats()
        assert (stats.num_free_pages, stats.num_waiting, stats.num_running, stats.num_held, stats.num_importing) == (
            stats.num_pages,
            0,
            0,
            0,
            0,
        )


def copy_pages(source: PagedEngine, pages: tuple[int, ...], target: PagedEngine, into: tuple[int, ...]) -> None:
    """What a transfer does, by plain indexing."""
    target.cache.pages[list(into)] = source.cache.pages[list(pages)]
