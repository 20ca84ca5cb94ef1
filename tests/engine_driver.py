"""Runs an engine step by step, checks what must hold after each, and keeps what came out."""

from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor

from shared.blocks import PAGE_TOKENS, BlockHash, TokenIds, pages_for
from shared.engine.engine import PagedEngine
from shared.engine.port import BlockChanges, EngineRequest, StepOutput, TokenOutput
from shared.kv.progress import Chunk
from shared.request import FinishReason, SamplingParams


def greedy(max_tokens: int, **changes) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **changes)


def request(key: str, ids: TokenIds, sampling: SamplingParams, **changes) -> EngineRequest:
    """A request whose ids are all prompt, unless `prompt_len` says otherwise."""
    return EngineRequest(key=key, ids=ids, sampling=sampling, **{"prompt_len": len(ids), **changes})


class Driver:
    """An engine and the history of its outputs.

    Attributes:
        blocks, host_blocks: what a listener to the engine's changes knows of.
        chunks: those that on_chunk told of, by key.
        held_pages: what on_chunk said, of those that were added with hold_kv and are not aborted.
    """

    def __init__(self, engine: PagedEngine) -> None:
        self.engine = engine
        self.outputs: dict[str, list[TokenOutput]] = defaultdict(list)
        self.started: list[str] = []
        self.batch_sizes: list[int] = []
        self.blocks: set[BlockHash] = set()
        self.host_blocks: set[BlockHash] = set()
        self.chunks: dict[str, list[Chunk]] = {}
        self.held_pages: dict[str, tuple[int, ...]] = {}
        self._held: dict[str, Tensor] = {}

    def add(self, wanted: EngineRequest) -> None:
        """Add a request; with hold_kv, watch what becomes of its pages until `abort`."""
        if not wanted.hold_kv:
            self.engine.add(wanted)
            return

        def on_chunk(chunk: Chunk, pages: tuple[int, ...]) -> None:
            chunks = self.chunks.setdefault(wanted.key, [])
            assert len(pages) == pages_for(len(wanted.ids))
            assert self.held_pages.setdefault(wanted.key, pages) == pages, "the pages are others now"
            assert chunk.start == chunks[-1].end if chunks else chunk.start % PAGE_TOKENS == 0
            assert chunk.start < chunk.end <= len(wanted.ids)
            assert chunk.layers.num_done() == 0, "told of a chunk that is computed already"
            chunks.append(chunk)

        self.engine.add(replace(wanted, on_chunk=on_chunk))

    def abort(self, key: str) -> None:
        self.engine.abort(key)
        self.held_pages.pop(key, None)
        self._held.pop(key, None)

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
            if token.key in self.held_pages:
                self._check_complete(token)
        for key, kv in self._held.items():
            assert self._kv(key).equal(kv), f"the KV that {key} holds is another now"
        self.started += output.started
        self.batch_sizes.append(output.num_batch_tokens)
        self._listen(self.engine.take_block_changes())
        return output

    def _listen(self, changes: BlockChanges) -> None:
        for blocks, stored, evicted in (
            (self.blocks, changes.stored, changes.evicted),
            (self.host_blocks, changes.host_stored, changes.host_evicted),
        ):
            assert not blocks & set(stored)
            assert blocks >= set(evicted)
            blocks |= set(stored)
            blocks -= set(evicted)
        assert len(self.host_blocks) == self.engine.stats().num_host_pages <= self.engine.limits.num_host_pages

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
            self.add(each)
        self.run()
        return [self.tokens(each.key) for each in requests]

    def tokens(self, key: str) -> list[int]:
        return [output.token_id for output in self.outputs[key]]

    def finish(self, key: str) -> FinishReason | None:
        return self.outputs[key][-1].finish

    def num_cached_tokens(self, key: str) -> int | None:
        return self.outputs[key][0].num_cached_tokens

    def _check_complete(self, token: TokenOutput) -> None:
        """All chunks are done; what the pages hold now stays until `abort`."""
        chunks = self.chunks[token.key]
        num_layers = self.engine.model.layout.num_layers
        assert [chunk.layers.num_done() for chunk in chunks] == [num_layers] * len(chunks)
        if token.num_cached_tokens is not None:
            assert chunks[0].start == token.num_cached_tokens
        self._held[token.key] = self._kv(token.key)

    def _kv(self, key: str) -> Tensor:
        """What the pages hold, bit by bit."""
        return self.engine.cache.pages[list(self.held_pages[key])].view(torch.uint8)

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
