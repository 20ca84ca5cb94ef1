"""`python -m benchmarks.random_load`: minutes of random work on two engines, and whatever does not add up afterwards.

Both engines run one small random model on one device, with few pages, so that requests are preempted. Requests of all
kinds come in waves; some are cancelled at a random moment, some are held after their first token and moved to the other
engine as a transfer does it: their pages are copied on a stream of its own, while both engines have batches in flight.
Now and then all work is let run out; then no page, seat or byte may be missing. Some greedy answers are computed again
at the end, alone, by plain torch, and must be the same.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer

from benchmarks.engine.build import (
    RUNNERS,
    SHAPES,
    TOKEN_WEIGHTS,
    BenchPlan,
    engine_over,
    random_checkpoint,
    settle_memory,
    synchronize,
)
from benchmarks.engine.drive import DecodeRows, Work, greedy, run_all
from benchmarks.engine.machine import commit, machine
from shared.blocks import PAGE_TOKENS, TokenIds
from shared.engine.engine import PagedEngine
from shared.engine.port import EngineRequest, TokenOutput
from shared.kv.progress import Chunk
from shared.request import FinishReason, SamplingParams

MAX_TIE_GAP = 1e-3
"""Two log probabilities this close may change places when a batch has another shape (float32 gives about 1e-5)."""

MAX_STUCK_STEPS = 2000
MAX_HOST_GROWTH_BYTES = 64 * 2**20
MAX_DEVICE_GROWTH_BYTES = 2**20
NUM_PREFIXES = 8


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What comes.

    Attributes:
        seconds: of load; the comparison follows.
        wave_s: all work is let run out this often.
        max_open: most requests at once, on both engines together.
        max_prompt, max_answer: tokens.
        num_compared: greedy answers that are computed again.
        max_drift: by which share the same work may take longer at the end.
    """

    seconds: float
    seed: int
    wave_s: float
    max_open: int
    max_prompt: int
    max_answer: int
    num_compared: int
    max_drift: float


@dataclass(slots=True)
class Tracked:
    """A request on its way, and what is known of it outside of the engine.

    Attributes:
        home: index of the engine that has it.
        held_pages: of a request that is to be moved.
        is_held: it waits for that: its first token has come and did not end it.
    """

    request: EngineRequest
    home: int
    tokens: list[int]
    held_pages: tuple[int, ...] = ()
    is_held: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer that was served."""

    prompt: TokenIds
    sampling: SamplingParams
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ebb:
    """Bytes in use at a moment without any request."""

    at_s: float
    device_bytes: int
    host_bytes: int


class RandomLoad:
    """Two engines under random work; `violations` says what went wrong."""

    def __init__(self, engines: Sequence[PagedEngine], plan: LoadPlan) -> None:
        self.engines = engines
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self.answers: list[Answer] = []
        self.ebbs: list[Ebb] = []
        self._plan = plan
        self._rng = Random(plan.seed)
        self._work = Work(engines[0].model.vocab_size, plan.seed)
        self._prefixes = [self._work.prompt(self._rng.randint(1, 4) * PAGE_TOKENS) for _ in range(NUM_PREFIXES)]
        self._open: dict[str, Tracked] = {}
        self._num_stuck_steps = 0
        device = engines[0].cache.device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self) -> None:
        """Waves of load until the time is over; stops at the first violation."""
        began_s = time.monotonic()
        while time.monotonic() - began_s < self._plan.seconds and not self.violations:
            wave_end_s = min(time.monotonic() + self._plan.wave_s, began_s + self._plan.seconds)
            limit = 0
            while time.monotonic() < wave_end_s and not self.violations:
                if self._rng.random() < 0.03:
                    limit = round(self._plan.max_open * self._rng.random())
                self._come(limit)
                self._turn()
            while self._open and not self.violations:
                self._turn()
            self._ebb(time.monotonic() - began_s)

    def probe_s(self) -> float:
        """Seconds of a fixed amount of work on the first engine; the best of five."""
        length = self._plan.max_prompt // 8
        return min(
            run_all(self.engines[0], self._work.requests(8, length, greedy(self._plan.max_answer // 4)))
            for _ in range(5)
        )

    def fill_seats(self) -> None:
        """Every engine must be able to run as many requests as it says."""
        for engine in self.engines:
            rows = DecodeRows(engine, self._work, engine.limits.max_running, 1, greedy(16))
            rows.steps(4)
            rows.close()
            engine.check()

    def _turn(self) -> None:
        """One step of every engine, and what happens beside it."""
        for index, engine in enumerate(self.engines):
            if engine.has_work():
                self._step(index, engine)
        if self._open and self._rng.random() < 0.02:
            self._cancel(self._rng.choice(list(self._open)))
        for key, tracked in list(self._open.items()):
            if tracked.is_held and self._rng.random() < 0.2:
                self._move(key, tracked)
        if self._rng.random() < 0.02:
            for engine in self.engines:
                self._checked(engine)
                engine.take_block_changes()

    def _come(self, limit: int) -> None:
        while len(self._open) < limit and self._rng.random() < 0.5:
            request = self._request()
            home = self._rng.randrange(len(self.engines))
            tracked = self._open[request.key] = Tracked(request, home, [])
            if self._rng.random() < 0.3:
                tracked.request = replace(
                    request, hold_kv=True, on_chunk=lambda *chunk, to=tracked: self._told(to, *chunk)
                )
            self.engines[home].add(tracked.request)
            self.counts["requests"] += 1

    def _request(self) -> EngineRequest:
        rng, plan = self._rng, self._plan
        prompt = self._work.prompt(round(plan.max_prompt ** rng.random()))
        if rng.random() < 0.3:
            prompt = (rng.choice(self._prefixes) + prompt)[: plan.max_prompt]
        return EngineRequest(
            key=self._work.key(),
            ids=prompt,
            prompt_len=len(prompt),
            sampling=random_sampling(rng, round(plan.max_answer ** rng.random()), self.engines[0].model.vocab_size),
            choice=rng.randrange(3),
            cache_salt=rng.choice(("", "", "other")),
        )

    def _step(self, index: int, engine: PagedEngine) -> None:
        output = engine.step()
        self.counts["steps"] += 1
        progressed = output.tokens or output.num_batch_tokens
        self._num_stuck_steps = 0 if progressed else self._num_stuck_steps + 1
        if self._num_stuck_steps > MAX_STUCK_STEPS:
            self.violations.append(f"engine {index} has work and does none of it: {engine.stats()}")
        if output.num_batch_tokens > engine.limits.max_batch_tokens:
            self.violations.append(f"a step of {output.num_batch_tokens} token rows")
        for token in output.tokens:
            self._take(index, token)

    def _take(self, index: int, token: TokenOutput) -> None:
        tracked = self._open.get(token.key)
        if tracked is None or tracked.home != index:
            self.violations.append(f"engine {index} gave a token of {token.key}, which it does not have")
            return
        if token.index != len(tracked.tokens):
            self.violations.append(f"{token.key}: token {token.index} after {len(tracked.tokens)}")
        tracked.tokens.append(token.token_id)
        sampling = tracked.request.sampling
        if (token.logprob is None) != (sampling.logprobs is None):
            self.violations.append(f"{token.key}: logprobs {sampling.logprobs}, but {token.logprob}")
        if token.finish is FinishReason.FAILED:
            self.violations.append(f"{token.key} failed: {token.error}")
        if (token.finish is FinishReason.LENGTH) != (len(tracked.tokens) == sampling.max_tokens) and (
            token.finish is not FinishReason.STOP
        ):
            self.violations.append(f"{token.key}: {token.finish} at token {token.index} of {sampling.max_tokens}")
        if token.finish is not None:
            self._finish(tracked)
        elif tracked.request.hold_kv:
            tracked.is_held = True

    def _told(self, tracked: Tracked, chunk: Chunk, pages: tuple[int, ...]) -> None:
        """A chunk of a request that is to be moved is launched."""
        if tracked.held_pages not in ((), pages):
            self.violations.append(
                f"{tracked.request.key}: pages were {tracked.held_pages}, and are {pages} from {chunk}"
            )
        tracked.held_pages = pages

    def _finish(self, tracked: Tracked) -> None:
        del self._open[tracked.request.key]
        self.engines[tracked.home].abort(tracked.request.key)  # one that was to be moved keeps its pages until then
        self.counts["finished"] += 1
        if tracked.request.sampling.temperature == 0:
            # A reservoir: every greedy answer has the same chance to be computed again.
            self.counts["greedy"] += 1
            prompt = tracked.request.ids[: tracked.request.prompt_len]
            answer = Answer(prompt, tracked.request.sampling, tuple(tracked.tokens))
            if len(self.answers) < self._plan.num_compared:
                self.answers.append(answer)
            elif (place := self._rng.randrange(self.counts["greedy"])) < len(self.answers):
                self.answers[place] = answer

    def _cancel(self, key: str) -> None:
        tracked = self._open.pop(key)
        self.engines[tracked.home].abort(key)
        self.counts["cancelled"] += 1

    def _move(self, key: str, tracked: Tracked) -> None:
        """Hand a held request to the other engine; it stays held if there is no room."""
        source, target_index = self.engines[tracked.home], 1 - tracked.home
        target = self.engines[target_index]
        request = replace(tracked.request, hold_kv=False, on_chunk=None)
        reservation = target.reserve(request)
        if reservation is None:
            self.counts["reservations refused"] += 1
            return
        first = reservation.num_cached_pages
        pairs = list(zip(tracked.held_pages[first:], reservation.pages[first:], strict=True))
        if self._rng.random() < 0.1:  # the transfer fails
            target.abort(key)
            self.counts["imports given up"] += 1
            return
        self._copy(source, target, pairs)
        target.imported(key, tracked.tokens[-1], exact=self._rng.random() < 0.5)
        source.abort(key)
        tracked.request, tracked.home, tracked.held_pages, tracked.is_held = request, target_index, (), False
        self.counts["imported"] += 1

    def _copy(self, source: PagedEngine, target: PagedEngine, pairs: Sequence[tuple[int, int]]) -> None:
        with torch.cuda.stream(self._copies):
            for from_page, into_page in pairs:
                target.cache.pages[into_page].copy_(source.cache.pages[from_page])
        if self._copies is not None:
            self._copies.synchronize()

    def _checked(self, engine: PagedEngine) -> None:
        try:
            engine.check()
        except AssertionError as error:
            self.violations.append(f"check: {error}")

    def _ebb(self, at_s: float) -> None:
        """With nothing to do, let what is in flight end; then everything must be free."""
        for engine in self.engines:
            while engine.has_work():
                engine.step()
            self._checked(engine)
            stats = engine.stats()
            if self.violations:
                continue
            left = (stats.num_waiting, stats.num_running, stats.num_held, stats.num_importing)
            if any(left) or stats.num_free_pages != stats.num_pages:
                self.violations.append(f"after all work: {stats}")
        device = self.engines[0].cache.device
        synchronize(device)
        device_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.ebbs.append(Ebb(round(at_s, 1), device_bytes, host_bytes()))


def random_sampling(rng: Random, max_tokens: int, vocab_size: int) -> SamplingParams:
    """Half of them greedy; each extra now and then."""

    def sometimes(share: float, value: Any, otherwise: Any) -> Any:
        return value if rng.random() < share else otherwise

    return SamplingParams(
        max_tokens=max_tokens,
        seed=rng.getrandbits(63),
        min_tokens=sometimes(0.1, rng.randint(0, max_tokens), 0),
        temperature=sometimes(0.5, rng.uniform(0.1, 2.0), 0.0),
        top_k=sometimes(0.2, rng.randint(1, 200), 0),
        top_p=sometimes(0.3, rng.uniform(0.1, 1.0), 1.0),
        min_p=sometimes(0.2, rng.uniform(0.0, 0.2), 0.0),
        repetition_penalty=sometimes(0.1, rng.uniform(0.8, 1.5), 1.0),
        presence_penalty=sometimes(0.1, rng.uniform(-1.0, 1.0), 0.0),
        frequency_penalty=sometimes(0.1, rng.uniform(-1.0, 1.0), 0.0),
        stop_token_ids=tuple(sometimes(0.2, rng.sample(range(vocab_size), 3), ())),
        ignore_eos=rng.random() < 0.5,
        logprobs=sometimes(0.15, rng.randint(0, 5), None),
    )


def compare(engine: PagedEngine, key: str, answer: Answer) -> str | None:
    """How a served answer differs from the engine's own, computed alone: None, "tie" or words."""
    outputs: list[TokenOutput] = []
    sampling = replace(answer.sampling, logprobs=2)
    # A salt of its own: nothing of it is found in the prefix cache.
    run_all(engine, [EngineRequest(key, answer.prompt, len(answer.prompt), sampling, cache_salt=key)], outputs.append)
    for output, served in zip(outputs, answer.tokens, strict=False):
        if output.token_id == served:
            continue
        assert output.logprob is not None
        gaps = [output.logprob.logprob - logprob for token_id, logprob in output.logprob.top if token_id == served]
        if gaps and gaps[0] <= MAX_TIE_GAP:
            return "tie"
        return f"{key}: token {output.index} of a prompt of {len(answer.prompt)} is {served}, alone {output.token_id}"
    if len(outputs) != len(answer.tokens):
        return f"{key}: {len(answer.tokens)} tokens, alone {len(outputs)}"
    return None


def growth(ebbs: Sequence[Ebb]) -> list[str]:
    """What memory says: at the end no more may be in use than after the first quarter."""
    if len(ebbs) < 2:
        return []
    early, last = ebbs[len(ebbs) // 4], ebbs[-1]
    found: list[str] = []
    if last.device_bytes - early.device_bytes > MAX_DEVICE_GROWTH_BYTES:
        found.append(f"the device's memory grew: {early} to {last}")
    if last.host_bytes - early.host_bytes > MAX_HOST_GROWTH_BYTES:
        found.append(f"the host's memory grew: {early} to {last}")
    return found


def late_since(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What came late between two readings."""
    return {
        name: count[len(before[name]) :] if name == "compiled" else count - before[name]
        for name, count in after.items()
    }


def host_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(shape: Mapping[str, Any], engine_plan: BenchPlan, plan: LoadPlan) -> dict[str, Any]:
    """Everything, as one report; `violations` is empty if all is well."""
    device = torch.device(engine_plan.device)
    checkpoint = random_checkpoint(shape, engine_plan.dtype, device, TOKEN_WEIGHTS)
    built = [engine_over(checkpoint, engine_plan) for _ in range(2)]
    load = RandomLoad([each.engine for each in built], plan)
    settle_memory()
    # Of the whole process: what building the second engine took counts as late for the first.
    late_before = [each.late_work() for each in built]
    before_s = after_s = load.probe_s()
    load.run()
    if not load.violations:
        after_s = load.probe_s()
        load.fill_seats()
    late_work = [late_since(before, each.late_work()) for before, each in zip(late_before, built, strict=True)]
    violations = load.violations + growth(load.ebbs)
    num_preemptions = [engine.stats().num_preemptions for engine in load.engines]
    violations += [
        f"nobody was {what}: the load proves nothing of that"
        for what, count in (("preempted", sum(num_preemptions)), ("imported", load.counts["imported"]))
        if not count
    ]
    violations += [f"after ready: {each}" for each in late_work if any(each.values())]
    if after_s > before_s * (1 + plan.max_drift):
        violations.append(f"the same work took {1e3 * before_s:.1f} ms at first and {1e3 * after_s:.1f} ms at the end")
    num_ties = 0
    if not load.violations:
        alone = engine_over(checkpoint, replace(engine_plan, runner="torch")).engine
        differences = [compare(alone, f"alone-{index}", answer) for index, answer in enumerate(load.answers)]
        num_ties = differences.count("tie")
        violations += [difference for difference in differences if difference not in (None, "tie")]
    return {
        "violations": violations,
        "counts": dict(load.counts),
        "preemptions": num_preemptions,
        "tokens": [engine.stats().num_generated_tokens for engine in load.engines],
        "prefix_hits": [engine.stats().num_prefix_hits for engine in load.engines],
        "compared": len(load.answers),
        "compared_tokens": sum(len(answer.tokens) for answer in load.answers),
        "ties": num_ties,
        "probe_ms": [round(1e3 * before_s, 2), round(1e3 * after_s, 2)],
        "runs": built[0].runs,
        "late_work": late_work,
        "ebbs": [asdict(ebb) for ebb in load.ebbs],
        "engine": asdict(engine_plan),
        "load": asdict(plan),
    }


def main(
    *,
    seconds: Annotated[float, typer.Option(help="Of load; the comparison takes as long as it takes.")] = 240.0,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 1,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "small",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    runner: Annotated[str, typer.Option(help=f"One of {', '.join(RUNNERS)}; by default triton on cuda.")] = "",
    num_pages: Annotated[int, typer.Option(help="KV pages of each engine.")] = 64,
    max_running: Annotated[int, typer.Option(help="Requests in the running batch.")] = 32,
    max_batch_tokens: Annotated[int, typer.Option(help="Token rows of one step.")] = 512,
    max_prompt: Annotated[int, typer.Option(help="Longest prompt in tokens.")] = 1500,
    max_answer: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 200,
    wave: Annotated[float, typer.Option(help="Seconds after which all work is let run out.")] = 15.0,
    compared: Annotated[int, typer.Option(help="Greedy answers that are computed again.")] = 200,
    max_drift: Annotated[float, typer.Option(help="By which share the same work may be slower at the end.")] = 0.1,
    revision: Annotated[str, typer.Option(help="Commit to name in the result where git cannot tell.")] = "",
    out: Annotated[str, typer.Option(help="Write the report to this file too.")] = "",
) -> None:
    """Random work on two engines of one device; fails on whatever does not add up."""
    engine_plan = BenchPlan(
        device=device,
        dtype="float32",  # in bf16 equal answers would depend on the batch
        runner=runner or ("triton" if device == "cuda" else "torch"),
        num_pages=num_pages,
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
    )
    plan = LoadPlan(
        seconds=seconds,
        seed=seed,
        wave_s=wave,
        max_open=4 * max_running,
        max_prompt=max_prompt,
        max_answer=max_answer,
        num_compared=compared,
        max_drift=max_drift,
    )
    report = run(SHAPES[shape], engine_plan, plan)
    report |= {"machine": machine(device), "date": time.strftime("%Y-%m-%d"), "commit": revision or commit()}
    if out:
        Path(out).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    shown = report | {"ebbs": [report["ebbs"][0], report["ebbs"][-1]] if report["ebbs"] else []}
    sys.stdout.write(json.dumps(shown, indent=1, ensure_ascii=False) + "\n")
    sys.exit(1 if report["violations"] else 0)


if __name__ == "__main__":
    typer.run(main)
