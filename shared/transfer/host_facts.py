"""What a worker tells its peers of the machine that it runs on, so that both can say why their link is slow."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch


@dataclass(frozen=True, slots=True)
class HostFacts:
    """Where one worker runs. Two workers are on one host exactly if their `boot_id` is the same: containers have
    hostnames of their own, but one kernel.

    Attributes:
        pid_namespace, ipc_namespace, net_namespace: of the process, as the kernel names them: "pid:[4026531836]".
        device: kind of the device that holds the KV, "cpu" or "cuda".
        gpu_uuid: of that device.
        visible_gpus: CUDA_VISIBLE_DEVICES; None where it is not set.
        ucx_tls: UCX_TLS; None where it is not set, and UCX may use all it has.
        net_devices: network devices that UCX may use, as UCX_NET_DEVICES.
        rdma_devices: RDMA devices that the process sees, whether UCX may use them or not.
    """

    boot_id: str
    hostname: str
    pid_namespace: str
    ipc_namespace: str
    net_namespace: str
    device: str
    gpu_uuid: str | None = None
    visible_gpus: str | None = None
    ucx_tls: str | None = None
    net_devices: str = "all"
    rdma_devices: tuple[str, ...] = ()


def read_host_facts(
    device: torch.device, environ: Mapping[str, str], *, net_devices: str, root: Path = Path("/")
) -> HostFacts:
    """The facts of this process.

    Args:
        net_devices: what UCX is given where `environ` has no UCX_NET_DEVICES.
        root: under which /proc and /sys lie.

    Raises:
        OSError: this is no Linux with /proc.
    """
    namespaces, infiniband = root / "proc/self/ns", root / "sys/class/infiniband"
    return HostFacts(
        boot_id=(root / "proc/sys/kernel/random/boot_id").read_text().strip(),
        hostname=(root / "proc/sys/kernel/hostname").read_text().strip(),
        pid_namespace=str((namespaces / "pid").readlink()),
        ipc_namespace=str((namespaces / "ipc").readlink()),
        net_namespace=str((namespaces / "net").readlink()),
        device=device.type,
        gpu_uuid=_gpu_uuid(device) if device.type == "cuda" else None,
        visible_gpus=environ.get("CUDA_VISIBLE_DEVICES"),
        ucx_tls=environ.get("UCX_TLS"),
        net_devices=environ.get("UCX_NET_DEVICES", net_devices),
        rdma_devices=tuple(sorted(entry.name for entry in infiniband.iterdir())) if infiniband.is_dir() else (),
    )


def can_access_peer(device: torch.device, gpu_uuid: str | None) -> bool | None:
    """Whether the hardware and the driver let our GPU read that one; None: it is masked from us, or no GPU at all."""
    if device.type != "cuda":
        return None
    index = cast("int | None", device.index)
    ours = torch.cuda.current_device() if index is None else index
    for visible in range(torch.cuda.device_count()):
        if _gpu_uuid(torch.device("cuda", visible)) == gpu_uuid:
            return visible == ours or torch.cuda.can_device_access_peer(ours, visible)
    return None


def _gpu_uuid(device: torch.device) -> str:
    properties = cast("Any", torch.cuda.get_device_properties(device))  # pyright: ignore[reportUnknownMemberType]
    return str(properties.uuid)
