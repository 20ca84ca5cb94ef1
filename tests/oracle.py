"""What transformers answers: greedy, in float32, one prompt at a time."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


class Oracle:
    """A checkpoint run by transformers."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, ids: Sequence[int], num_new: int) -> list[int]:
        """The `num_new` tokens behind `ids`; EOS ends nothing."""
        tokens = torch.tensor([list(ids)])
        with torch.inference_mode():
            output = self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=num_new,
                eos_token_id=None,
                pad_token_id=0,
            )
        return output[0, len(ids) :].tolist()
