"""Picks the next token of each row from its logits.

    logits ─> penalties ─> (log probabilities) ─> forbidden ends ─> temperature ─> top-k ─> top-p ─> min-p ─> draw

The draw is by Gumbel-max: the token with the largest `logit / temperature + g`, where g = -log(-log(u)) and u is a
uniform number that depends on (seed, choice, token index, token id) alone. So a row's token depends neither on the rows
beside it nor on where or how often the request ran.
"""

# pyright: reportUnknownMemberType=false
# torch types tolist, split and unflatten only in part.

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.engine.batch import BatchRow, Sampled, forbidden_ends
from shared.request import TokenLogprob

NOT_FINITE = "the logits hold NaN or infinity"
NOTHING_LEFT = "no token is left to pick from"

MASK_64 = 2**64 - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB

TOP_CANDIDATES = 1024
"""Likeliest tokens sorted at first for top-p; all are sorted only where these do not reach p."""


class Sampler:
    """Sampling for one vocabulary; keeps no state between calls."""

    def __init__(self, eos_token_ids: tuple[int, ...], vocab_size: int) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)
        self._vocab_size = vocab_size

    def sample(self, logits: Tensor, rows: Sequence[BatchRow]) -> list[Sampled]:
        """One token for each of `rows` from `logits` `[len(rows), vocab]` of any float dtype.

        A row whose logits hold NaN or infinity, if only after its penalties, or where nothing is left to pick from,
        fails alone.
        """
        if all(_is_plain_greedy(row) for row in rows):
            return _largest(logits)
        scores = _penalised(logits.to(torch.float32), rows)
        finite = scores.amax(-1).isfinite()  # a NaN wins every maximum
        scores = torch.where(finite[:, None], scores, 0.0)
        allowed = self._without_ends(scores, rows)
        possible = allowed.amax(-1) > -math.inf
        ids = _picked(allowed, rows)
        logprobs = _logprobs(scores, ids, rows)
        results: list[Sampled] = []
        for index, (is_finite, is_possible) in enumerate(zip(_flags(finite), _flags(possible), strict=True)):
            if not is_finite:
                results.append(Sampled(-1, error=NOT_FINITE))
            elif not is_possible:
                results.append(Sampled(-1, error=NOTHING_LEFT))
            else:
                results.append(Sampled(ids[index], logprobs[index]))
        return results

    def _without_ends(self, scores: Tensor, rows: Sequence[BatchRow]) -> Tensor:
        """`scores` with -inf at the tokens that would end a row too early."""
        places = [
            (index, token)
            for index, row in enumerate(rows)
            if row.forbid_end
            for token in forbidden_ends(row.sampling, self._eos_token_ids, self._vocab_size)
        ]
        if not places:
            return scores
        index = torch.tensor(places, device=scores.device)
        return scores.index_put((index[:, 0], index[:, 1]), scores.new_tensor(-math.inf))


def splitmix64(state: int) -> int:
    """The output of SplitMix64 (Steele, Lea, Flood 2014) for a 64-bit state that was already advanced."""
    state = ((state ^ (state >> 30)) * MIX_1) & MASK_64
    state = ((state ^ (state >> 27)) * MIX_2) & MASK_64
    return state ^ (state >> 31)


def stream_key(seed: int, choice: int, token_index: int) -> int:
    """The 64-bit start of the random stream of one token."""
    return _mixed(choice_key(seed, choice), token_index)


def choice_key(seed: int, choice: int) -> int:
    """What `stream_key` is before the token index is mixed in: the same for all tokens of a choice."""
    return _mixed(_mixed(0, seed), choice)


def gumbel_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, for int64 `keys` (stream keys) and `token_ids` of one shape.

    Element n of a stream is output n + 1 of SplitMix64 started at the key. 52 bits make u, centred in its cell, so
    that it is neither 0 nor 1 and the noise is finite.
    """
    state = keys + (token_ids + 1) * _signed(GOLDEN_GAMMA)
    state = (state ^ _shifted(state, 30)) * _signed(MIX_1)
    state = (state ^ _shifted(state, 27)) * _signed(MIX_2)
    bits = _shifted(state ^ _shifted(state, 31), 12)
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _mixed(key: int, word: int) -> int:
    """Each word is mixed in before the next is added."""
    return splitmix64((key + (word & MASK_64) + GOLDEN_GAMMA) & MASK_64)


def _largest(logits: Tensor) -> list[Sampled]:
    """The first of the largest logits of each row."""
    peaks, ids = logits.max(-1)
    return [
        Sampled(token) if is_finite else Sampled(-1, error=NOT_FINITE)
        for token, is_finite in zip(_ints(ids), _flags(peaks.isfinite()), strict=True)
    ]


def _is_plain_greedy(row: BatchRow) -> bool:
    """Whether the row's token is just the largest of its logits."""
    sampling = row.sampling
    return sampling.temperature == 0 and sampling.logprobs is None and not row.forbid_end and not sampling.has_penalty


def _penalised(scores: Tensor, rows: Sequence[BatchRow]) -> Tensor:
    """Repetition penalty for tokens of prompt and answer; then presence and frequency penalties for the answer's."""
    penalised = [index for index, row in enumerate(rows) if row.sampling.has_penalty]
    if not penalised:
        return scores
    scores = scores.clone()
    for index in penalised:
        row, sampling, own = rows[index], rows[index].sampling, scores[index]
        known = np.frombuffer(row.ids[: row.end], dtype=np.int32)
        is_seen = _counts(known, own) > 0
        penalty = sampling.repetition_penalty
        own = torch.where(is_seen, torch.where(own > 0, own / penalty, own * penalty), own)
        answered = _counts(known[row.prompt_len :], own)
        own -= sampling.presence_penalty * (answered > 0) + sampling.frequency_penalty * answered
        scores[index] = own
    return scores


def _counts(token_ids: NDArray[np.int32], scores: Tensor) -> Tensor:
    """How often each token of the vocabulary occurs, shaped as one row of `scores`."""
    return torch.tensor(token_ids, dtype=torch.int64, device=scores.device).bincount(minlength=len(scores))


def _picked(scores: Tensor, rows: Sequence[BatchRow]) -> list[int]:
    """Token ids: the largest score where the temperature is 0, else a draw."""
    ids = _ints(scores.argmax(-1))
    drawn = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        tokens = _draw(scores[drawn], [rows[index] for index in drawn])
        for index, token in zip(drawn, tokens, strict=True):
            ids[index] = token
    return ids


def _draw(scores: Tensor, rows: Sequence[BatchRow]) -> list[int]:
    """One draw a row among the scores that its filters keep."""
    temperatures = torch.tensor([row.sampling.temperature for row in rows], dtype=torch.float64, device=scores.device)
    wide = scores.to(torch.float64)
    # Below the peak, not as they are: near temperature 0 all but the peak overflow, and to where they belong.
    scaled = (wide - wide.amax(-1, keepdim=True)) / temperatures[:, None]
    kept = scaled >= _thresholds(scaled, rows)[:, None]
    row_index, token_ids = (kept & (scaled > -math.inf)).nonzero(as_tuple=True)
    keys = [stream_key(row.sampling.seed, row.choice, row.end - row.prompt_len) for row in rows]
    row_keys = torch.tensor([_signed(key) for key in keys], device=scores.device)
    noise = gumbel_noise(row_keys[row_index], token_ids)
    noisy = torch.full_like(scaled, -math.inf)
    noisy[row_index, token_ids] = scaled[row_index, token_ids] + noise
    return _ints(noisy.argmax(-1))


def _thresholds(scaled: Tensor, rows: Sequence[BatchRow]) -> Tensor:
    """The least value that each row's top-k, top-p and min-p keep, float64 `[len(rows)]`.

    Tokens that tie with the last one kept are kept too: which of them a sort puts first must not matter.
    """
    vocab_size = scaled.shape[-1]
    thresholds = torch.full_like(scaled[:, 0], -math.inf)
    top_k = [min(row.sampling.top_k or vocab_size, vocab_size) for row in rows]
    limited = [index for index, k in enumerate(top_k) if k < vocab_size]
    if limited:
        ks = torch.tensor([top_k[index] for index in limited], device=scaled.device)
        best = scaled[limited].topk(max(top_k[index] for index in limited)).values
        thresholds[limited] = best.gather(1, ks[:, None] - 1)[:, 0]
    nucleus = [index for index, row in enumerate(rows) if row.sampling.top_p < 1]
    if nucleus:
        top_p = torch.tensor([rows[i].sampling.top_p for i in nucleus], dtype=torch.float64, device=scaled.device)
        thresholds[nucleus] = _nucleus_thresholds(scaled[nucleus], thresholds[nucleus], top_p)
    min_p = [row.sampling.min_p for row in rows]
    if any(min_p):
        fractions = torch.tensor(min_p, dtype=torch.float64, device=scaled.device)
        thresholds = torch.maximum(thresholds, scaled.amax(-1) + fractions.log())
    return thresholds


def _nucleus_thresholds(scaled: Tensor, thresholds: Tensor, top_p: Tensor) -> Tensor:
    """The last value of the smallest set of likeliest tokens, among those not below `thresholds`, that reaches p."""
    kept = scaled.masked_fill(scaled < thresholds[:, None], -math.inf)
    total = kept.logsumexp(-1, keepdim=True)
    for width in (min(TOP_CANDIDATES, scaled.shape[-1]), scaled.shape[-1]):
        best = kept.topk(width).values
        probabilities = (best - total).exp()
        mass = probabilities.cumsum(-1)
        if bool((mass[:, -1] >= top_p).all()):
            break
    in_set = mass - probabilities < top_p[:, None]
    return best.masked_fill(~in_set, math.inf).amin(-1)


def _logprobs(scores: Tensor, ids: Sequence[int], rows: Sequence[BatchRow]) -> list[TokenLogprob | None]:
    """Log probability of each row's token and of its likeliest rivals, where asked for."""
    wanted = {index: row.sampling.logprobs for index, row in enumerate(rows) if row.sampling.logprobs is not None}
    results: list[TokenLogprob | None] = [None] * len(rows)
    if not wanted:
        return results
    logprobs = scores[list(wanted)].log_softmax(-1)
    chosen = torch.tensor([ids[index] for index in wanted], device=scores.device)
    own = cast("list[float]", logprobs.gather(1, chosen[:, None])[:, 0].tolist())
    best = logprobs.topk(min(max(wanted.values()), scores.shape[-1]))
    values = cast("list[list[float]]", best.values.tolist())
    tokens = cast("list[list[int]]", best.indices.tolist())
    for place, (index, num_top) in enumerate(wanted.items()):
        top = zip(tokens[place][:num_top], values[place][:num_top], strict=True)
        results[index] = TokenLogprob(own[place], tuple(top))
    return results


def _ints(values: Tensor) -> list[int]:
    return cast("list[int]", values.tolist())


def _flags(values: Tensor) -> list[bool]:
    return cast("list[bool]", values.tolist())


def _signed(word: int) -> int:
    """The 64-bit word as a signed number, as torch.int64 holds it."""
    return word - 2**64 if word >= 2**63 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 `words`, whose own shift copies the sign."""
    return (words >> bits) & (2 ** (64 - bits) - 1)
