"""Bodies to begin with, and bodies that are large or odd as a whole."""

import json

from tests.flow.system import MODEL

BODIES = [
    {"model": MODEL, "prompt": "hello", "max_tokens": 3},
    {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 3, "n": 2, "logprobs": 1, "stop": ["x"], "seed": 1},
    {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True},
    {
        "model": MODEL,
        "messages": [{"role": "system", "content": [{"type": "text", "text": "{{ 7 * 7 }}"}]}],
        "max_tokens": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "stop_token_ids": [9],
        "min_tokens": 1,
        "temperature": 0.5,
        "repetition_penalty": 1.5,
    },
]

SPECIAL_BODIES = [
    json.dumps({"model": MODEL, "prompt": [5] * 200_000}).encode(),
    json.dumps({"model": MODEL, "prompt": "word " * 50_000}).encode(),
    json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}] * 4097}).encode(),
    json.dumps({"model": MODEL, "prompt": "x", "stop": ["x"] * 100_000}).encode(),
    json.dumps({"model": MODEL, "prompt": "x", **{f"field{n}": n for n in range(20_000)}}).encode(),
    b'{"model": "fake", "model": "other", "prompt": "x", "max_tokens": 2, "max_tokens": 1}',
    b'{"model": "fake", "prompt": "x", "max_tokens": 1' + b"0" * 400 + b"}",
    b'{"model": "fake", "prompt": "x", "temperature": 1e999, "max_tokens": 1}',
    b'{"model": "fake", "prompt": "x", "seed": -9223372036854775809, "max_tokens": 1}',
    b"x" * 1_000_001,
]
