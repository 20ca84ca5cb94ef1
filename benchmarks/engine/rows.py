"""The rows of the engine's tables, each measured on one ready engine."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from time import perf_counter

from benchmarks.engine.drive import DecodeRows, Work, greedy, run_all
from benchmarks.engine.profile import Profile, profile_steps
from shared.blocks import pages_for
from shared.engine.port import Engine, EngineRequest
from shared.request import SamplingParams

NUM_STEPS = 128
"""Steps between the two times that a step is computed from."""

NUM_WARM_STEPS = 4
NUM_PROFILED_STEPS = 8
NUM_LATER_REQUESTS = 20

SAMPLINGS: Mapping[str, SamplingParams] = {
    "filters": SamplingParams(max_tokens=1, temperature=0.8, top_p=0.9, min_p=0.05, seed=7, ignore_eos=True),
    "penalties": replace(
        greedy(1), repetition_penalty=1.1, presence_penalty=0.3, frequency_penalty=0.3, ignore_eos=True
    ),
    "logprobs": replace(greedy(1), logprobs=5),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work the rows are.

    Attributes:
        first: prompt lengths.
        prefill: prompts and their length; the first of 1024 tokens shares its time with the decode row of that size.
        decode: rows and their context.
        throughput: requests, prompt and answer tokens.
        mixed: decode rows, their context, tokens of the chunk beside them.
        sampling: decode rows, their context.
        repeats: of which the best counts; first tokens take the middle of one more.
        steady_steps: full steps that are timed in one go.
    """

    first: Sequence[int]
    prefill: Sequence[tuple[int, int]]
    decode: Sequence[tuple[int, int]]
    throughput: tuple[int, int, int]
    mixed: tuple[int, int, int]
    sampling: tuple[int, int]
    repeats: int
    steady_steps: int

    def with_repeats(self, repeats: int) -> "Sizes":
        return replace(self, repeats=repeats)

    @property
    def num_pages(self) -> int:
        """Pages that the largest row needs."""
        number, num_prompt, num_answer = self.throughput
        rows = [(number, num_prompt + num_answer), *self.prefill]
        rows += [(batch, context + NUM_STEPS + 1) for batch, context in self.decode]
        rows.append((self.mixed[0], self.mixed[1] + 3 * self.steady_steps + self.mixed[2]))
        return max(batch * pages_for(num_tokens + 1) for batch, num_tokens in rows) + 64

    @property
    def num_rows(self) -> int:
        """Requests that run at once at most."""
        return max(self.throughput[0], *(batch for batch, _ in (*self.prefill, *self.decode)))


FULL = Sizes(
    first=(128, 512, 2048, 8192),
    prefill=((16, 4096), (64, 1024)),
    decode=((1, 1024), (16, 1024), (64, 1024), (256, 1024), (64, 4096)),
    throughput=(512, 1024, 256),
    mixed=(64, 1024, 512),
    sampling=(64, 1024),
    repeats=2,
    steady_steps=64,
)

TINY = Sizes(
    first=(8, 70),
    prefill=((3, 70),),
    decode=((1, 70), (3, 70)),
    throughput=(6, 20, 5),
    mixed=(2, 70, 16),
    sampling=(2, 70),
    repeats=1,
    steady_steps=4,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One measured quantity.

    Attributes:
        unit: "ms", "s", "tok/s", "%" or "×".
        all: every repeat, in the order of measuring.
        steady_ms: of a decode step, one full step of many, launched back to back.
        profile: device time of such a step (or of the row's one step); None without CUDA.
    """

    name: str
    unit: str
    value: float
    all: Sequence[float]
    steady_ms: float | None = None
    profile: Profile | None = None


def first_token_name(num_tokens: int) -> str:
    return f"first token, {num_tokens}"


def decode_name(batch: int, context: int) -> str:
    return f"decode step, {batch} × {context}"


class Bench:
    """An engine and what is measured on it."""

    def __init__(self, engine: Engine, sizes: Sizes, *, on_cuda: bool, seed: int) -> None:
        self._engine = engine
        self._sizes = sizes
        self._on_cuda = on_cuda
        self._work = Work(engine.model.vocab_size, seed)
        self._one_token_s: dict[tuple[int, int], list[float]] = {}

    def groups(self) -> Mapping[str, Callable[[], list[Row]]]:
        """What `--rows` names, in the order of measuring.

        A first request is the first only once; the mixed step uses the profiler, which may slow down what follows.
        """
        return {
            "first": self.first_request,
            "prefill": lambda: [*self.first_tokens(), *self.prefills()],
            "decode": self.decode_steps,
            "throughput": self.throughput,
            "sampling": self.sampling,
            "mixed": self.mixed_step,
        }

    def profiles(self, names: Collection[str]) -> Mapping[str, Profile]:
        """Device time of those first tokens and decode steps that are among the `names` of rows; none without CUDA."""
        if not self._on_cuda:
            return {}
        found: dict[str, Profile] = {}
        for length in self._sizes.first:
            if first_token_name(length) in names:
                [request] = self._work.requests(1, length, greedy(1))
                found[first_token_name(length)] = profile_steps(1, partial(run_all, self._engine, [request]))
        for batch, context in self._sizes.decode:
            if decode_name(batch, context) in names:
                _, profile = self._full_steps(batch, context)
                assert profile is not None
                found[decode_name(batch, context)] = profile
        return found

    def first_request(self) -> list[Row]:
        """The first request after ready against the median of the next ones, each alone."""
        num_tokens = self._sizes.first[0]
        requests = self._work.requests(1 + NUM_LATER_REQUESTS, num_tokens, greedy(16))
        times_s = [run_all(self._engine, [request]) for request in requests]
        usual_s = median(times_s[1:])
        return [
            Row("first request after ready", "×", times_s[0] / usual_s, [times_s[0] * 1e3, usual_s * 1e3]),
        ]

    def first_tokens(self) -> list[Row]:
        """One prompt at a time, until its first token."""
        rows: list[Row] = []
        for num_tokens in self._sizes.first:
            times_ms = [
                1e3 * run_all(self._engine, self._work.requests(1, num_tokens, greedy(1)))
                for _ in range(self._sizes.repeats + 1)
            ]
            rows.append(Row(first_token_name(num_tokens), "ms", median(times_ms), times_ms))
        return rows

    def prefills(self) -> list[Row]:
        """Prompt tokens a second of many prompts that come at once."""
        rows: list[Row] = []
        for number, num_tokens in self._sizes.prefill:
            rates = [number * num_tokens / took_s for took_s in self._one_token_times_s(number, num_tokens)]
            rows.append(Row(f"prefill {number} × {num_tokens}", "tok/s", max(rates), rates))
        return rows

    def decode_steps(self) -> list[Row]:
        """Of a whole batch, (time of 129 tokens - time of 1) / 128; beside it full steps alone."""
        rows: list[Row] = []
        for batch, context in self._sizes.decode:
            one_s = min(self._one_token_times_s(batch, context))
            times_ms = [
                1e3
                * (run_all(self._engine, self._work.requests(batch, context, greedy(NUM_STEPS + 1))) - one_s)
                / NUM_STEPS
                for _ in range(self._sizes.repeats)
            ]
            steady_ms = self._steady_ms(batch, context, greedy)
            rows.append(Row(decode_name(batch, context), "ms", min(times_ms), times_ms, steady_ms))
        return rows

    def throughput(self) -> list[Row]:
        """Answer tokens a second of many requests that come at once. Once: it takes longest."""
        number, num_prompt, num_answer = self._sizes.throughput
        took_s = run_all(self._engine, self._work.requests(number, num_prompt, greedy(num_answer)))
        rate = number * num_answer / took_s
        return [Row(f"{number} × {num_prompt} → {num_answer}", "tok/s", rate, [rate])]

    def mixed_step(self) -> list[Row]:
        """A step of decode rows and a chunk, over the chunk alone and the decode attention of the rows.

        The attention is what the rows' context adds to their step: a step at the context less one of a single page.
        """
        batch, context, chunk = self._sizes.mixed
        plain_ms = self._device_step_ms(batch, context)
        short_ms = self._device_step_ms(batch, 1)
        chunk_ms = self._chunks_ms(chunk)
        mixed_ms = self._mixed_ms(batch, context, chunk)
        parts_ms = chunk_ms + max(0.0, plain_ms - short_ms)
        return [
            Row("mixed step over its parts", "×", mixed_ms / parts_ms, [mixed_ms, chunk_ms, plain_ms, short_ms]),
        ]

    def sampling(self) -> list[Row]:
        """Percent that each kind of sampling adds to a greedy full step, the kinds by turns."""
        batch, context = self._sizes.sampling
        times_ms: dict[str, list[float]] = {"greedy": [], **{name: [] for name in SAMPLINGS}}
        for _ in range(self._sizes.repeats + 1):
            times_ms["greedy"].append(self._steady_ms(batch, context, greedy))
            for name, sampling in SAMPLINGS.items():
                times_ms[name].append(
                    self._steady_ms(batch, context, lambda count, kind=sampling: replace(kind, max_tokens=count))
                )
        base_ms = min(times_ms.pop("greedy"))
        return [Row(name, "%", 100 * (min(each) / base_ms - 1), each) for name, each in times_ms.items()]

    def _one_token_times_s(self, number: int, num_tokens: int) -> list[float]:
        """Seconds of `number` prompts with one token each; measured once for all rows that ask."""
        times_s = self._one_token_s.setdefault((number, num_tokens), [])
        while len(times_s) < self._sizes.repeats:
            times_s.append(self._prefill_once(number, num_tokens))
        return times_s

    def _prefill_once(self, number: int, num_tokens: int) -> float:
        return run_all(self._engine, self._work.requests(number, num_tokens, greedy(1)))

    def _full_steps(self, batch: int, context: int) -> tuple[float, Profile | None]:
        """Milliseconds of a full greedy step of some in a row, and the profile of some more."""
        rows = self._decode_rows(batch, context, greedy)
        rows.steps(NUM_WARM_STEPS)
        steady_ms = 1e3 * rows.steps(NUM_PROFILED_STEPS)
        profile = self._profile(NUM_PROFILED_STEPS, lambda: rows.steps(NUM_PROFILED_STEPS))
        rows.close()
        return steady_ms, profile

    def _steady_ms(self, batch: int, context: int, sampling: Callable[[int], SamplingParams]) -> float:
        rows = self._decode_rows(batch, context, sampling)
        rows.steps(NUM_WARM_STEPS)
        steady_ms = 1e3 * rows.steps(self._sizes.steady_steps)
        rows.close()
        return steady_ms

    def _device_step_ms(self, batch: int, context: int) -> float:
        steady_ms, profile = self._full_steps(batch, context)
        return steady_ms if profile is None else profile.step_ms

    def _chunks_ms(self, chunk: int) -> float:
        """Of a step that computes one chunk alone."""
        requests = self._work.requests(2 * NUM_PROFILED_STEPS, chunk, greedy(1))
        alone, profiled = requests[:NUM_PROFILED_STEPS], requests[NUM_PROFILED_STEPS:]
        times_ms = [1e3 * run_all(self._engine, [request]) for request in alone]
        profile = self._profile(len(profiled), lambda: [run_all(self._engine, [request]) for request in profiled])
        return median(times_ms) if profile is None else profile.step_ms

    def _mixed_ms(self, batch: int, context: int, chunk: int) -> float:
        """Of a step of decode rows and one chunk: a prompt comes before each step."""
        rows = self._decode_rows(batch, context, greedy)
        requests = iter(self._work.requests(2 * NUM_WARM_STEPS + 2 * NUM_PROFILED_STEPS, chunk, greedy(1)))
        for _ in range(NUM_WARM_STEPS):
            self._step_with(next(requests))
        times_ms = [self._step_with(next(requests)) for _ in range(NUM_PROFILED_STEPS)]
        profile = self._profile(
            NUM_PROFILED_STEPS, lambda: [self._step_with(next(requests)) for _ in range(NUM_PROFILED_STEPS)]
        )
        rows.close()
        return median(times_ms) if profile is None else profile.step_ms

    def _step_with(self, request: EngineRequest) -> float:
        """Milliseconds of a step before which a request came."""
        began_s = perf_counter()
        self._engine.add(request)
        self._engine.step()
        return 1e3 * (perf_counter() - began_s)

    def _decode_rows(self, batch: int, context: int, sampling: Callable[[int], SamplingParams]) -> DecodeRows:
        num_tokens = 3 * (NUM_WARM_STEPS + NUM_PROFILED_STEPS) + self._sizes.steady_steps
        return DecodeRows(self._engine, self._work, batch, context, sampling(num_tokens))

    def _profile(self, num_steps: int, run: Callable[[], object]) -> Profile | None:
        return profile_steps(num_steps, run) if self._on_cuda else None
