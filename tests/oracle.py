"""What transformers answers, one prompt at a time: greedy tokens, or the logits behind each position."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class Oracle:
    """A checkpoint run by transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def answer(self, ids: Sequence[int], num_new: int) -> list[int]:
        """The `num_new` tokens behind `ids`; EOS ends nothing."""
        tokens = torch.tensor([list(ids)], device=self._model.device)
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

    def logits(self, ids: Sequence[int]) -> Tensor:
        """float32 `[len(ids), vocab]`: of the token behind each position, given `ids` up to there."""
        with torch.inference_mode():
            return self._model(torch.tensor([list(ids)], device=self._model.device)).logits[0].float()
