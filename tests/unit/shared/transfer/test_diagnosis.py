from dataclasses import replace

import pytest

from shared.transfer.diagnosis import diagnose, unreachable
from shared.transfer.host_facts import HostFacts
from shared.transfer.transport import UNPROVEN

LEFT = HostFacts(
    boot_id="b-1",
    hostname="left",
    pid_namespace="pid:[1]",
    ipc_namespace="ipc:[1]",
    net_namespace="net:[1]",
    device="cuda",
    gpu_uuid="GPU-0",
    visible_gpus="0",
    net_devices="lo",
)
RIGHT = replace(LEFT, hostname="right", gpu_uuid="GPU-1", visible_gpus="1")
RDMA_LEFT = replace(LEFT, net_devices="mlx5_0:1", rdma_devices=("mlx5_0", "mlx5_1"))
RDMA_AFAR = replace(RDMA_LEFT, boot_id="b-2", hostname="afar")


@pytest.mark.parametrize(
    ("theirs", "peer_access", "cause", "cure"),
    [
        (replace(RIGHT, ucx_tls="tcp,cuda_copy"), None, "UCX_TLS=tcp,cuda_copy", "add cuda_ipc"),
        (replace(RIGHT, ucx_tls="^cuda_ipc"), None, "UCX_TLS=^cuda_ipc", "unset"),
        (replace(RIGHT, pid_namespace="pid:[2]"), None, "PID namespaces", "pid: host"),
        (replace(RIGHT, ipc_namespace="ipc:[2]"), None, "IPC namespaces", "ipc: host"),
        (replace(RIGHT, gpu_uuid="GPU-0"), None, "both workers are on GPU GPU-0", "GPU of its own"),
        (RIGHT, False, "cannot read GPU GPU-1", "topo -p2p"),
        (replace(RIGHT, visible_gpus=None), True, "several GPUs", "own GPU alone"),
        (replace(RIGHT, visible_gpus="1,0"), None, "several GPUs", "own GPU alone"),
        (RIGHT, True, "no cause that we know", "docs/links.md"),
    ],
)
def test_why_two_gpus_of_one_host_do_without_cuda_ipc(
    theirs: HostFacts, peer_access: bool | None, cause: str, cure: str
) -> None:
    for first, second in ((LEFT, theirs), (theirs, LEFT)):
        told = diagnose(first, second, "cuda_copy+tcp", peer_access=peer_access)
        assert told is not None
        assert "cuda_copy+tcp" in told
        assert cure in told
        if peer_access is not False:
            assert cause in told
    told = diagnose(LEFT, theirs, "cuda_copy+tcp", peer_access=peer_access)
    assert told is not None
    assert cause in told


def test_cuda_ipc_needs_no_excuse() -> None:
    assert diagnose(LEFT, replace(RIGHT, pid_namespace="pid:[2]"), "cuda_ipc") is None


def test_that_peers_differ_is_told_too() -> None:
    assert diagnose(LEFT, RIGHT, "cuda_ipc or tcp") is not None


@pytest.mark.parametrize("ucx_tls", [None, "", "all", "cuda,tcp", "tcp,cuda_ipc", "^sysv,posix"])
def test_what_leaves_cuda_ipc_in_is_not_blamed(ucx_tls: str | None) -> None:
    told = diagnose(LEFT, replace(RIGHT, ucx_tls=ucx_tls), "tcp")
    assert told is not None
    assert "UCX_TLS" not in told


def test_cpu_workers_of_one_host_use_tcp() -> None:
    cpu = replace(LEFT, device="cpu", gpu_uuid=None)
    assert diagnose(cpu, cpu, "tcp") is None
    assert diagnose(cpu, RIGHT, "tcp") is None


@pytest.mark.parametrize(
    ("theirs", "part"),
    [
        (replace(RDMA_AFAR, ucx_tls="tcp"), "UCX_TLS=tcp leaves RDMA out"),
        (replace(RDMA_AFAR, ucx_tls="^ib"), "UCX_TLS=^ib leaves RDMA out"),
        (replace(RDMA_AFAR, net_devices="eth0"), "on afar may use eth0"),
        (replace(RDMA_AFAR, ucx_tls="^rc_x,ud", net_devices="all"), "memlock=-1"),
        (RDMA_AFAR, "/dev/infiniband"),
    ],
)
def test_why_two_hosts_with_rdma_use_tcp(theirs: HostFacts, part: str) -> None:
    for told in (diagnose(RDMA_LEFT, theirs, "tcp"), diagnose(theirs, RDMA_LEFT, "cuda_copy+tcp")):
        assert told is not None
        assert part in told


def test_two_hosts_without_rdma_on_one_side_can_do_no_better_than_tcp() -> None:
    assert diagnose(replace(LEFT, net_devices="eth0"), RDMA_AFAR, "tcp") is None


def test_rdma_between_hosts_needs_no_excuse() -> None:
    assert diagnose(RDMA_LEFT, RDMA_AFAR, "rc_mlx5") is None


def test_a_transport_that_nobody_proved_is_told() -> None:
    told = diagnose(LEFT, RIGHT, UNPROVEN)
    assert told is not None
    assert "UCX_PROTO_INFO" in told


def test_loopback_reaches_no_other_network() -> None:
    assert unreachable(LEFT, RIGHT) is None
    for theirs in (replace(RIGHT, boot_id="b-2"), replace(RIGHT, net_namespace="net:[2]")):
        told = unreachable(replace(LEFT, net_devices="eth0"), theirs)
        assert told is not None
        assert "right" in told
        assert "BATON_TRANSFER_NET_DEVICES" in told
        assert unreachable(replace(LEFT, net_devices="eth0"), replace(theirs, net_devices="eth0")) is None
