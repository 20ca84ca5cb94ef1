"""Settings of a worker, from the environment."""

from typing import Literal

from pydantic import Field

from shared.runtime.settings import ServiceSettings


class WorkerSettings(ServiceSettings):
    """BATON_* variables of prefill and decode workers.

    Attributes:
        name: for people, in logs and `/v1/models`.
        device: where torch runs the model, "cpu" or "cuda".
        dtype: of weights and KV; the checkpoint's own if not set.
        num_pages: KV pages (64 tokens each) to allocate.
        max_running: requests in the running batch.
        max_batch_tokens: token rows of one step; longer prompts are prefilled in chunks.
        transfer_host: address on which peers pull KV.
        transfer_port: 0 takes a free one.
        transfer_net_devices: network devices that UCX may use beside shared memory and NVLink, as UCX_NET_DEVICES.
        hold_s: how long prefill keeps KV for the decode worker.
        pull_timeout_s: a pull that takes longer has failed; decode prefills then.
        drain_s, step_s: see `WorkerLimits`.
    """

    name: str = ""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] | None = None
    num_pages: int = Field(default=256, ge=2)
    max_running: int = Field(default=32, ge=1)
    max_batch_tokens: int = Field(default=512, ge=64)
    transfer_host: str = "127.0.0.1"
    transfer_port: int = Field(default=0, ge=0, le=65535)
    transfer_net_devices: str = "lo"
    hold_s: float = Field(default=30.0, gt=0)
    pull_timeout_s: float = Field(default=20.0, gt=0)
    drain_s: float = Field(default=30.0, ge=0)
    step_s: float = Field(default=60.0, gt=0)
