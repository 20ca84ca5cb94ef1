"""`python -m benchmarks.wire_accuracy --model FOLDER`: what lossy wire formats cost in accuracy, with a real model.

Real text, teacher-forced: the KV of a prefix goes through the wire format once, as on its way to a decode worker; then
the tokens that follow the prefix in the text are computed over it. Their distributions are held against those over the
exact KV: KL(exact || received), and how often the most probable token is the same.

The same again with a large key bias in one channel pair, as Qwen2's models have: added to the keys before they are
packed and taken away again behind the unpacking, so that the model itself stays as it is. Such a bias is turned with
its position like the keys are; `pair` 31 of a head of 64 channels turns slowest.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.engine.machine import commit, machine
from shared.blocks import PAGE_TOKENS, pages_for
from shared.engine.attention.sdpa import PagedSdpa, Run
from shared.engine.layers.kernels import TORCH_KERNELS
from shared.engine.weights import Checkpoint, load_checkpoint
from shared.kv.copy import PageCopier
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache
from shared.kv.wire_format import LayerSpan, WireFormat, packed_bytes, page_formats
from shared.text.tokeniser import Tokeniser

TOPICS = (
    "compound",
    "debugger",
    "formatstrings",
    "specialnames",
    "typesseq",
    "execmodel",
    "assignment",
    "string-methods",
)
"""Chapters of Python's reference manual, as its standard library carries them: one text each."""

PREFIX_TOKENS = 1024
NEXT_TOKENS = 192
KEY_BIAS = 40.0

BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Case:
    """A wire format, and the channel pair of the keys that has a bias of `KEY_BIAS` on the wire; None: no bias."""

    fmt: WireFormat
    biased_pair: int | None

    def __str__(self) -> str:
        return f"{self.fmt}" if self.biased_pair is None else f"{self.fmt} bias in pair {self.biased_pair}"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Over all tokens of all texts.

    Attributes:
        bytes_ratio: of the prefix, to its KV in bfloat16.
        kl: mean KL(exact || received) of the next token's distribution, nats.
        top_1: share of the places where both have the same most probable token.
        perplexity_ratio: of the text behind the prefix, received over exact.
    """

    bytes_ratio: float
    kl: float
    top_1: float
    perplexity_ratio: float


class Text:
    """One text, its prefix computed.

    Attributes:
        exact: log probabilities `[num_next, vocab]` behind each token that follows the prefix.
    """

    def __init__(self, checkpoint: Checkpoint, ids: list[int], prefix_tokens: int) -> None:
        """`prefix_tokens`: a whole number of pages."""
        self._checkpoint = checkpoint
        self._ids = torch.tensor(ids)
        self._prefix_tokens = prefix_tokens
        self._prefix_pages = prefix_tokens // PAGE_TOKENS
        self._cache = PagedCache(checkpoint.layout, pages_for(len(ids)), torch.device("cpu"))
        self._copier = PageCopier(self._cache, self._prefix_pages)
        self._forward(0, prefix_tokens, torch.tensor([0]))
        self._prefix = self._cache.pages[: self._prefix_pages].clone()
        self.exact = self._log_probabilities()

    def received(self, case: Case) -> Tensor:
        """As `exact`, over a prefix that has travelled as `case` says."""
        pages = self._cache.pages[: self._prefix_pages]
        pages.copy_(self._prefix)
        keys = pages[:, :, 0].transpose(0, 1)  # [layer, page, token, kv_head, head_dim]
        bias = 0 if case.biased_pair is None else self._bias(case.biased_pair)
        keys += bias
        for fmt, numbers in _by_format(case.fmt, self._prefix_pages):
            layout = self._checkpoint.layout
            layers = LayerSpan(0, layout.num_layers)
            run = torch.empty(packed_bytes(layout, fmt, len(numbers), layout.num_layers), dtype=torch.uint8)
            self._copier.pack(numbers, layers, fmt, run)
            pages[numbers.start : numbers.stop] = 0
            self._copier.unpack(run, numbers, layers, fmt)
        keys -= bias
        return self._log_probabilities()

    def perplexity(self, log_probabilities: Tensor) -> float:
        """Of the text behind the first token that follows the prefix."""
        following = self._ids[self._prefix_tokens + 1 :]
        return float(log_probabilities[:-1].gather(1, following[:, None]).mean().neg().exp())

    def _bias(self, pair: int) -> Tensor:
        """`[page, token, 1, head_dim]`: the bias of the pair, turned as the keys of each position are."""
        head_dim = self._checkpoint.layout.head_dim
        bias = torch.zeros(self._prefix_tokens, 1, head_dim)
        bias[..., pair] = bias[..., pair + head_dim // 2] = KEY_BIAS
        rotation = self._checkpoint.decoder.rotary_embedding().at(torch.arange(self._prefix_tokens))
        return rotation.turn(bias).view(self._prefix_pages, PAGE_TOKENS, 1, head_dim)

    def _log_probabilities(self) -> Tensor:
        num_next = len(self._ids) - self._prefix_tokens
        hidden = self._forward(self._prefix_tokens, len(self._ids), torch.arange(num_next))
        return self._checkpoint.decoder.logits(hidden, TORCH_KERNELS).log_softmax(-1)

    def _forward(self, start: int, end: int, wanted: Tensor) -> Tensor:
        decoder = self._checkpoint.decoder
        run = Run(start, end, tuple(range(pages_for(end))))
        attention = PagedSdpa(self._cache, [run], self._checkpoint.config, decoder.rotary_embedding())
        return decoder.forward(self._ids[start:end], attention, TORCH_KERNELS, wanted)


@torch.inference_mode()
def measure(
    checkpoint: Checkpoint, texts: list[list[int]], prefix_tokens: int, cases: list[Case]
) -> dict[Case, Accuracy]:
    """Send the first `prefix_tokens` (a whole number of pages) of each text as each case says."""
    sums = {case: torch.zeros(3, dtype=torch.float64) for case in cases}
    for ids in texts:
        text = Text(checkpoint, ids, prefix_tokens)
        exact, exact_perplexity = text.exact, text.perplexity(text.exact)
        for case in cases:
            received = text.received(case)
            kl = (exact.exp() * (exact - received)).sum(-1).mean()
            same = (exact.argmax(-1) == received.argmax(-1)).float().mean()
            sums[case] += torch.tensor([kl, same, text.perplexity(received) / exact_perplexity], dtype=torch.float64)
    return {
        case: Accuracy(
            bytes_ratio(checkpoint.layout, case.fmt, prefix_tokens // PAGE_TOKENS), *(total / len(texts)).tolist()
        )
        for case, total in sums.items()
    }


def bytes_ratio(layout: KvLayout, fmt: WireFormat, num_pages: int) -> float:
    """Of the first pages of a prompt in `fmt`, to the same in bfloat16."""
    packed = sum(
        packed_bytes(layout, part, len(numbers), layout.num_layers) for part, numbers in _by_format(fmt, num_pages)
    )
    values = 2 * layout.num_layers * num_pages * PAGE_TOKENS * layout.num_kv_heads * layout.head_dim
    return packed / (values * BF16_BYTES)


def _by_format(fmt: WireFormat, num_pages: int) -> Iterator[tuple[WireFormat, range]]:
    """The runs of a prompt's pages that travel in the same format."""
    start = 0
    for index in range(1, num_pages + 1):
        if index == num_pages or page_formats(fmt, index) is not page_formats(fmt, start):
            yield page_formats(fmt, start), range(start, index)
            start = index


def read_texts(folder: Path, num_texts: int, num_tokens: int) -> list[list[int]]:
    """The first tokens of `num_texts` chapters. Raises ValueError if there are not so many, or if one is shorter."""
    if num_texts > len(TOPICS):
        raise ValueError(f"{num_texts} texts are more than {len(TOPICS)}")
    tokeniser = Tokeniser.load(folder)
    texts = [list(tokeniser.encode(topics[name])[:num_tokens]) for name in TOPICS[:num_texts]]
    if any(len(ids) < num_tokens for ids in texts):
        raise ValueError(f"a text has fewer than {num_tokens} tokens")
    return texts


def main(
    *,
    model: Annotated[Path, typer.Option(help="Folder of a checkpoint.", exists=True, file_okay=False)],
    num_texts: Annotated[int, typer.Option("--texts", help="Texts, of so many tokens each.")] = 5,
    prefix_tokens: Annotated[int, typer.Option(help="Tokens whose KV travels; whole pages.")] = PREFIX_TOKENS,
    next_tokens: Annotated[int, typer.Option(help="Tokens computed behind them.")] = NEXT_TOKENS,
    out: Annotated[str, typer.Option(help="Write the result as JSON to this file.")] = "",
) -> None:
    """Measure what INT8 and INT4 cost, without and with a key bias, and print it."""
    checkpoint = load_checkpoint(model, "float32", torch.device("cpu"))
    slowest = checkpoint.layout.head_dim // 2 - 1
    cases = [Case(fmt, pair) for fmt in (WireFormat.INT8, WireFormat.INT4) for pair in (None, slowest, slowest // 2, 0)]
    texts = read_texts(model, num_texts, prefix_tokens + next_tokens)
    measured = measure(checkpoint, texts, prefix_tokens, cases)
    sys.stdout.write("format                    bytes     KL     top-1   perplexity\n")
    for case, accuracy in measured.items():
        sys.stdout.write(
            f"{case!s:25s} {accuracy.bytes_ratio:.3f}  {accuracy.kl:.1e}  {accuracy.top_1:6.1%}"
            f"   {accuracy.perplexity_ratio - 1:+.2%}\n"
        )
    if out:
        result = {
            "model": model.name,
            "texts": TOPICS[:num_texts],
            "prefix_tokens": prefix_tokens,
            "next_tokens": next_tokens,
            "key_bias": KEY_BIAS,
            "cases": [asdict(case) | asdict(accuracy) for case, accuracy in measured.items()],
            "machine": machine("cpu"),
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
        }
        Path(out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
