"""Kernels that begin while the one before them ends (programmatic dependent launch, from Hopper on).

A kernel that takes part is launched with `**launch_options(overlap)`, and is told so by a constant `OVERLAP`. Then it
- calls `gdc_launch_dependents` at its beginning: the next kernel may take the processors that it leaves free;
- calls `gdc_wait` in every program, before any early return, before it writes anything, and before it reads anything
  that a kernel of the same step may have written; weights it may read before. A program that ends without the wait
  would let the kernel end before the one that it follows, and the next kernel would see neither's results.
Kernels that do not take part, such as cuBLAS's, may stand anywhere between.

All who take part do so for one row only. In one run each on an H200, steps of one row (without attention) took 2
percent less by it with an 8B model, which is within the noise, and 7 percent less with a 1B model; with 8 to 64 rows,
where the kernels for them took part as well, 1 to 13 percent more.
"""

# pyright: reportUnknownMemberType=false
# torch.cuda is typed in part.

from functools import cache

import torch

HOPPER = 9
"""Major number of the first compute capability with such launches."""


def overlaps(num_rows: int, device: torch.device) -> bool:
    """Whether a kernel for `num_rows` rows on `device` takes part; never in Triton's interpreter."""
    return num_rows == 1 and device.type == "cuda" and _major_capability(device) >= HOPPER


@cache  # of what a device is: it never changes, and asking takes as long as a launch
def _major_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def launch_options(overlap: bool) -> dict[str, bool]:
    """Arguments of a Triton launch."""
    return {"launch_pdl": True} if overlap else {}
