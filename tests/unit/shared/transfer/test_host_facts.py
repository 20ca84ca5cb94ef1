from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.transfer.host_facts import HostFacts, can_access_peer, read_host_facts
from shared.wire.codec import Decoder, encode

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with one RDMA device."""
    (tmp_path / "proc/sys/kernel/random").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/random/boot_id").write_text("b-1\n")
    (tmp_path / "proc/sys/kernel/hostname").write_text("left\n")
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/self/ns/pid").symlink_to("pid:[7]")
    (tmp_path / "proc/self/ns/ipc").symlink_to("ipc:[8]")
    (tmp_path / "proc/self/ns/net").symlink_to("net:[9]")
    (tmp_path / "sys/class/infiniband/mlx5_1").mkdir(parents=True)
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir()
    return tmp_path


def test_what_is_read_of_a_host(root: Path) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "1", "UCX_TLS": "tcp", "UCX_NET_DEVICES": "eth0"}
    assert read_host_facts(CPU, environ, net_devices="lo", root=root) == HostFacts(
        boot_id="b-1",
        hostname="left",
        pid_namespace="pid:[7]",
        ipc_namespace="ipc:[8]",
        net_namespace="net:[9]",
        device="cpu",
        visible_gpus="1",
        ucx_tls="tcp",
        net_devices="eth0",
        rdma_devices=("mlx5_0", "mlx5_1"),
    )


def test_net_devices_are_those_of_the_settings_where_the_environment_names_none(root: Path) -> None:
    assert read_host_facts(CPU, {}, net_devices="eth1", root=root).net_devices == "eth1"


def test_a_host_without_rdma_has_no_rdma_devices(root: Path) -> None:
    for device in (root / "sys/class/infiniband").iterdir():
        device.rmdir()
    (root / "sys/class/infiniband").rmdir()
    assert read_host_facts(CPU, {}, net_devices="lo", root=root).rdma_devices == ()


def test_two_reads_of_this_process_agree() -> None:
    first, second = (read_host_facts(CPU, {}, net_devices="lo") for _ in range(2))
    assert first == second
    assert first.boot_id
    assert first.pid_namespace.startswith("pid:[")


def test_they_travel(root: Path) -> None:
    facts = replace(read_host_facts(CPU, {}, net_devices="lo", root=root), gpu_uuid="GPU-1")
    assert Decoder(HostFacts).decode(encode(facts)) == facts


def test_a_worker_without_a_gpu_knows_of_no_peer_access() -> None:
    assert can_access_peer(CPU, "GPU-1") is None
