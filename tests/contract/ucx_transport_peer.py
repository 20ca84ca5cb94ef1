"""One of several processes that send to each other by UCX; its UCX_TLS says how it may. Lines of JSON in and out.

Argument "any": endpoints may use shared memory too, which UCX keeps off those that must notice a dead peer.
"""

import asyncio
import json
import sys

import numpy as np
import ucxx
from ucxx.types import Tag

from shared.transfer.transport import SHOW_PROTOCOLS, read_transport

NUM_BYTES = 2**24
TAG = Tag(7)


async def main():
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    options = {"NET_DEVICES": "lo"} | SHOW_PROTOCOLS
    ucxx.init(options=options, progress_mode="thread", enable_python_future=True)
    sys.stdout.write(ucxx.get_worker_address().tobytes().hex() + "\n")
    sys.stdout.flush()
    endpoints = []
    buffer = np.ones(NUM_BYTES, np.uint8)
    while line := await lines.readline():
        command = json.loads(line)
        endpoint = await ucxx.create_endpoint_from_worker_address(
            ucxx.get_ucx_address_from_buffer(bytes.fromhex(command["peer"])),
            endpoint_error_handling=sys.argv[1:] != ["any"],
        )
        endpoints.append(endpoint)
        if command["do"] == "send":
            await endpoint.send(buffer, tag=TAG, force_tag=True)
            found = [read_transport(endpoint, memory="host")]
        else:
            await endpoint.recv(buffer, tag=TAG, force_tag=True)
            found = [read_transport(each, memory="host") for each in endpoints]
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
    for endpoint in endpoints:
        await asyncio.to_thread(endpoint.abort)
    await asyncio.to_thread(ucxx.stop_notifier_thread)
    ucxx.reset()


asyncio.run(main())
