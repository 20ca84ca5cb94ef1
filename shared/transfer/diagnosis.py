"""Why a link is not what it could be, and what to do about it, in words for the operator."""

from shared.transfer.host_facts import HostFacts
from shared.transfer.transport import UNPROVEN

CUDA_IPC = frozenset({"cuda", "cuda_ipc"})
"""Names in UCX_TLS that stand for CUDA IPC, alone or with others."""

RDMA = frozenset({"ib", "rc", "rc_v", "rc_x", "rc_verbs", "rc_mlx5"})
"""Names in UCX_TLS that stand for connected RDMA, alone or with others."""

RDMA_TRANSPORTS = ("rc_", "dc_", "ud_", "gga_")
"""How the names of transports over RDMA begin."""


def diagnose(ours: HostFacts, theirs: HostFacts, transport: str, *, peer_access: bool | None = None) -> str | None:
    """What is wrong with a link over `transport` (see `shared.transfer.transport`), cause and cure; None: nothing.

    Args:
        peer_access: whether our GPU can read theirs, where that is known.
    """
    if transport == UNPROVEN:
        return "UCX does not tell the transport of this link: unset UCX_PROTO_INFO and UCX_PROTO_ENABLE"
    if ours.boot_id == theirs.boot_id:
        both_cuda = ours.device == theirs.device == "cuda"
        return _no_cuda_ipc(ours, theirs, transport, peer_access) if both_cuda and transport != "cuda_ipc" else None
    if ours.rdma_devices and theirs.rdma_devices and not any(name in transport for name in RDMA_TRANSPORTS):
        return _no_rdma(ours, theirs, transport)
    return None


def unreachable(ours: HostFacts, theirs: HostFacts) -> str | None:
    """Why UCX cannot connect these two at all; None: nothing known."""
    if (ours.boot_id, ours.net_namespace) == (theirs.boot_id, theirs.net_namespace):
        return None
    for facts in (ours, theirs):
        if facts.net_devices == "lo":
            return (
                f"UCX on {facts.hostname} may use the loopback device alone, which the other host or container does "
                f"not reach: set BATON_TRANSFER_NET_DEVICES there to a device that both networks share"
            )
    return None


def _no_cuda_ipc(ours: HostFacts, theirs: HostFacts, transport: str, peer_access: bool | None) -> str:
    for facts in (ours, theirs):
        if not _allows(facts.ucx_tls, CUDA_IPC):
            return f"KV moves by {transport}: UCX_TLS={facts.ucx_tls} leaves CUDA IPC out; add cuda_ipc or unset it"
    if ours.pid_namespace != theirs.pid_namespace:
        return (
            f"KV moves by {transport}: the workers have PID namespaces of their own, between which CUDA shares no "
            f"memory; run both containers with pid: host, or one in the PID namespace of the other"
        )
    if ours.ipc_namespace != theirs.ipc_namespace:
        return (
            f"KV moves by {transport}: the workers have IPC namespaces of their own; run both containers with "
            f"ipc: host, or one in the IPC namespace of the other"
        )
    if ours.gpu_uuid == theirs.gpu_uuid:
        return (
            f"KV moves by {transport}: both workers are on GPU {ours.gpu_uuid}, seen with CUDA_VISIBLE_DEVICES="
            f"{ours.visible_gpus} and {theirs.visible_gpus}; give each a GPU of its own"
        )
    if peer_access is False:
        return (
            f"KV moves by {transport}: GPU {ours.gpu_uuid} cannot read GPU {theirs.gpu_uuid}; nvidia-smi topo -p2p r "
            f"shows which can; use such a pair, or turn off IOMMU and PCIe ACS where they forbid it"
        )
    for facts in (ours, theirs):
        if facts.visible_gpus is None or "," in facts.visible_gpus:
            return (
                f"KV moves by {transport}: CUDA_VISIBLE_DEVICES={facts.visible_gpus} shows a worker several GPUs, of "
                f"which UCX opens the first; show each worker its own GPU alone"
            )
    return (
        f"KV moves by {transport} between GPUs of one host, for no cause that we know; see whether "
        f"nvidia-smi topo -p2p r lets them read each other, and docs/links.md"
    )


def _no_rdma(ours: HostFacts, theirs: HostFacts, transport: str) -> str:
    for facts in (ours, theirs):
        if not _allows(facts.ucx_tls, RDMA):
            return f"KV moves by {transport}: UCX_TLS={facts.ucx_tls} leaves RDMA out; add rc, or unset it"
        if facts.net_devices != "all" and not any(device in facts.net_devices for device in facts.rdma_devices):
            return (
                f"KV moves by {transport}: UCX on {facts.hostname} may use {facts.net_devices}, none of the RDMA "
                f"devices {', '.join(facts.rdma_devices)}; add one with its port to BATON_TRANSFER_NET_DEVICES, "
                f"as {facts.rdma_devices[0]}:1"
            )
    return (
        f"KV moves by {transport} though both hosts have RDMA devices; give the containers /dev/infiniband and "
        f"--ulimit memlock=-1, and see whether the ports are up (ibv_devinfo)"
    )


def _allows(ucx_tls: str | None, names: frozenset[str]) -> bool:
    """Whether UCX_TLS, a list of what is allowed or after "^" of what is not, leaves in what `names` stand for.

    One variant of RDMA excluded leaves others, so "^rc_x" does.
    """
    if not ucx_tls:
        return True
    listed = {name.strip() for name in ucx_tls.removeprefix("^").split(",")}
    if ucx_tls.startswith("^"):
        return not listed & names & {"cuda", "cuda_ipc", "ib", "rc"}
    return "all" in listed or bool(listed & names)
