from shared.transfer.transport import UNPROVEN, selected_transport

ENDPOINT = """
#                 lane[0]:  0:tcp/lo.0 md[0]           -> md[0]/tcp/sysdev[255] am
# | ucp_context_0 intra-node cfg#2 | tagged message by ucp_tag_send* from host memory |
# |                         0..inf | eager short                              | tcp/lo |
"""


def table(what: str, *rows: tuple[str, str], cfg: int = 2) -> str:
    lines = [f"# | ucp_context_0 intra-node cfg#{cfg} | {what} |"]
    lines += [f"# |  {sizes} | zero-copy | {devices} |" for sizes, devices in rows]
    return "# +----+----+\n" + "\n".join(lines) + "\n# +--+--+\n\n"


FETCH = "rendezvous data fetch into cuda/GPU0 from cuda/GPU0"


def test_the_row_of_the_largest_messages_counts() -> None:
    tables = table(FETCH, ("0", ""), ("1..8K", "tcp/lo"), ("8K..inf", "cuda_ipc/cuda"))
    assert selected_transport(ENDPOINT, tables, memory="cuda") == "cuda_ipc"


def test_other_memory_other_operations_and_other_endpoints_do_not_count() -> None:
    tables = (
        table("rendezvous data fetch into host memory from host", ("0..inf", "tcp/lo"))
        + table("rendezvous data fetch(multi) into cuda/GPU0 from cuda/GPU0", ("0..inf", "tcp/lo"))
        + table("rendezvous data send from cuda/GPU0 to cuda/GPU0", ("0..inf", "tcp/lo"))
        + table(FETCH, ("0..inf", "tcp/lo"), cfg=22)
        + table(FETCH, ("0..inf", "rc_mlx5/mlx5_0:1"))
    )
    assert selected_transport(ENDPOINT, tables, memory="cuda") == "rc_mlx5"


def test_several_devices_of_one_transport_are_one_transport() -> None:
    tables = table(FETCH, ("0..inf", "50% on rc_mlx5/mlx5_0:1 and 50% on rc_mlx5/mlx5_1:1"))
    assert selected_transport(ENDPOINT, tables, memory="cuda") == "rc_mlx5"


def test_a_way_through_the_host_names_both_transports() -> None:
    tables = table(FETCH, ("0..inf", "cuda_copy/cuda and tcp/eth0"))
    assert selected_transport(ENDPOINT, tables, memory="cuda") == "cuda_copy+tcp"


def test_peers_of_one_configuration_that_ucx_treats_differently_leave_it_open() -> None:
    tables = table(FETCH, ("0..inf", "tcp/lo")) + table(FETCH, ("0..inf", "cuda_ipc/cuda"))
    assert selected_transport(ENDPOINT, tables, memory="cuda") == "cuda_ipc or tcp"


def test_without_a_table_nothing_is_proven() -> None:
    assert selected_transport(ENDPOINT, "", memory="cuda") == UNPROVEN
    assert selected_transport(ENDPOINT, table(FETCH), memory="cuda") == UNPROVEN
