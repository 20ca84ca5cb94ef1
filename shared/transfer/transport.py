"""Which transport UCX moves large messages by over one endpoint, in UCX's own words.

What an endpoint could use says little: UCX chooses by size, by kind of memory and by what it could open of the peer's
buffer, and where it could not open it drops to TCP without a word. The choice itself stands in tables that UCX prints
of an endpoint and, under `SHOW_PROTOCOLS`, of the worker, which the endpoint's tables name by the number of its
configuration:

    # | ucp_context_0 intra-node cfg#2 | rendezvous data fetch into cuda/GPU0 from cuda/GPU0 |
    # |                              0 | no data fetch                    |                    |
    # |                         1..inf | zero-copy read from remote       | cuda_ipc/cuda      |

A table is there once a message of its kind was received, so it is read after the self-test of a link.
"""

import ctypes
import re
from collections.abc import Iterator
from typing import Protocol

SHOW_PROTOCOLS = {"PROTO_INFO": "rendezvous data fetch*"}
"""Options of a UCX context whose workers tell how they receive. Unlike "y" it does not fill the log with tables."""

UNPROVEN = "unknown"
"""The transport of an endpoint that has received nothing large, or whose UCX was told to print other tables."""

_FETCH = "rendezvous data fetch into "
_CONFIGURATION = re.compile(r"\bcfg#\d+")
_TRANSPORT = re.compile(r"([a-z]\w*)/")


class UcpEndpoint(Protocol):
    """What is asked of a `ucxx.Endpoint`: handles of the C library."""

    @property
    def ucp_endpoint(self) -> int: ...

    @property
    def ucp_worker(self) -> int: ...


def read_transport(endpoint: UcpEndpoint, *, memory: str) -> str:
    """By which transport large messages arrive over `endpoint` in memory of this kind, "host" or "cuda"; see
    `selected_transport`. Call it after one has arrived, on the thread of the event loop."""
    return selected_transport(describe_endpoint(endpoint), describe_worker(endpoint), memory=memory)


def selected_transport(endpoint_tables: str, worker_tables: str, *, memory: str) -> str:
    """The same, from the text.

    "rc_mlx5"; "cuda_copy+tcp" where one message needs both; "cuda_ipc or tcp" where peers that UCX reaches by the same
    devices differ in what it can open of their memory; `UNPROVEN`.
    """
    configurations = set(_CONFIGURATION.findall(endpoint_tables))
    selected = {
        "+".join(dict.fromkeys(_TRANSPORT.findall(devices)))
        for head, devices in _largest_messages(worker_tables)
        if head[1].startswith(_FETCH + memory) and set(_CONFIGURATION.findall(head[0])) <= configurations
    }
    return " or ".join(sorted(selected - {""})) or UNPROVEN


def _largest_messages(tables: str) -> Iterator[tuple[tuple[str, str], str]]:
    """Head of each table, two cells, with the last cell of its last row: what carries the largest messages."""
    head: tuple[str, str] | None = None
    devices = ""
    for line in tables.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 2:
            if head is not None:
                yield head, devices
            head, devices = (cells[0], cells[1]), ""
        elif len(cells) == 3:
            devices = cells[2]
    if head is not None:
        yield head, devices


def describe_endpoint(endpoint: UcpEndpoint) -> str:
    """What UCX prints of an endpoint: its lanes, and how it sends."""
    return _printed("ucp_ep_print_info", endpoint.ucp_endpoint)


def describe_worker(endpoint: UcpEndpoint) -> str:
    """What UCX prints of the worker of an endpoint: how it receives, of which configuration."""
    return _printed("ucp_worker_print_info", endpoint.ucp_worker)


def _printed(function_name: str, handle: int) -> str:
    """Text that `void function(handle, FILE *)` of the UCP library prints. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.open_memstream.restype = ctypes.c_void_p
    print_to = ctypes.CDLL("libucp.so.0")[function_name]  # found by its name because ucxx has loaded it
    print_to.argtypes, print_to.restype = (ctypes.c_void_p, ctypes.c_void_p), None
    text, length = ctypes.c_void_p(), ctypes.c_size_t()
    stream = libc.open_memstream(ctypes.byref(text), ctypes.byref(length))
    if not stream:
        raise OSError(ctypes.get_errno(), "open_memstream")
    try:
        print_to(handle, stream)
    finally:
        libc.fclose(ctypes.c_void_p(stream))
    try:
        return ctypes.string_at(text, length.value).decode()
    finally:
        libc.free(text)
