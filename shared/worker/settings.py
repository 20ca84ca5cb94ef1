"""Settings of a worker, from the environment."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from shared.runtime.settings import ServiceSettings
from shared.worker.peers import LinkFloor


class WorkerSettings(ServiceSettings):
    """BATON_* variables of prefill and decode workers.

    Attributes:
        cuda_defaults: what is different where `device` is "cuda" and the environment does not say.
        name: for people, in logs and `/v1/models`.
        device: where torch runs the model, "cpu" or "cuda".
        dtype: of weights and KV; the checkpoint's own if not set.
        kernels: "triton" (on a GPU) or "torch", the slow and plain reference.
        num_pages: KV pages (64 tokens each) to allocate; None, on a GPU only, takes as many as fit.
        gpu_memory_share: of the GPU's memory, what this worker may take in all; read where num_pages is None.
        host_cache_gb: memory of the host, in 10^9 bytes, taken at the start for pages that go from the cache; 0: none.
        max_running: requests in the running batch.
        max_batch_tokens: token rows of one step; longer prompts are prefilled in chunks.
        transfer_host: address on which peers pull KV.
        transfer_port: 0 takes a free one.
        transfer_net_devices: network devices that UCX may use beside shared memory and NVLink, as UCX_NET_DEVICES.
        transfer_floor_gb_per_s: a link to a peer that carries less is below the floor; None, the default: no floor.
        transfer_floor_action: what a link below the floor does: the worker serves and says that it is "degraded", or
            it does not start ("refuse"; a link that comes later makes it degraded).
        hold_s: how long prefill keeps KV for the decode worker once all of it is computed.
        pull_timeout_s: a pull that is not done so long after the first token has failed; decode prefills then.
        drain_s, step_s: see `WorkerLimits`.
    """

    cuda_defaults: ClassVar[dict[str, object]] = {
        "kernels": "triton",
        "num_pages": None,
        "max_running": 256,
        "max_batch_tokens": 8192,
        "step_s": 10.0,
    }

    name: str = ""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] | None = None
    kernels: Literal["triton", "torch"] = "torch"
    num_pages: int | None = Field(default=256, ge=2)
    gpu_memory_share: float = Field(default=0.9, gt=0, le=1)
    host_cache_gb: float = Field(default=0, ge=0)
    max_running: int = Field(default=32, ge=1)
    max_batch_tokens: int = Field(default=512, ge=64)
    transfer_host: str = "127.0.0.1"
    transfer_port: int = Field(default=0, ge=0, le=65535)
    transfer_net_devices: str = "lo"
    transfer_floor_gb_per_s: float | None = Field(default=None, gt=0)
    transfer_floor_action: Literal["degraded", "refuse"] = "degraded"
    hold_s: float = Field(default=30.0, gt=0)
    pull_timeout_s: float = Field(default=20.0, gt=0)
    drain_s: float = Field(default=30.0, ge=0)
    step_s: float = Field(default=60.0, gt=0)

    @property
    def link_floor(self) -> LinkFloor | None:
        """The slowest link that is taken for good, if there is one."""
        if self.transfer_floor_gb_per_s is None:
            return None
        return LinkFloor(self.transfer_floor_gb_per_s, refuse=self.transfer_floor_action == "refuse")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_device(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {**cls.cuda_defaults, **given} if given.get("device") == "cuda" else given

    @model_validator(mode="after")
    def _refuse_what_does_not_go_together(self) -> Self:
        if self.max_batch_tokens < self.max_running:
            raise ValueError(
                f"BATON_MAX_BATCH_TOKENS, {self.max_batch_tokens}, must be at least BATON_MAX_RUNNING, "
                f"{self.max_running}: each running request takes one token row of a step"
            )
        if self.device == "cpu" and self.kernels == "triton":
            raise ValueError("BATON_KERNELS is triton, which needs BATON_DEVICE=cuda")
        if self.device == "cpu" and self.num_pages is None:
            raise ValueError("BATON_NUM_PAGES must be set where BATON_DEVICE is cpu")
        return self
