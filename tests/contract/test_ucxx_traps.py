"""What ucxx does that one would not expect, each with what we do about it. A new ucxx that does better fails here."""

import asyncio
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
import ucxx
from ucxx.types import Tag

from shared.errors import KvTransferFailed
from shared.transfer import link_meter
from shared.transfer.link import Link
from shared.transfer.progress_thread import SPIN_S
from shared.transfer.ucx import UcxContext

TIMEOUT_S = 30.0
LARGE_BYTES = 2**26


def run_script(body, timeout_s=TIMEOUT_S):
    return subprocess.run([sys.executable, "-c", body], timeout=timeout_s, capture_output=True, text=True, check=False)


async def endpoints(context):
    """Two endpoints, one for sending and one for receiving, between this process and itself."""
    return [
        await ucxx.create_endpoint_from_worker_address(ucxx.get_ucx_address_from_buffer(context.address))
        for _ in range(2)
    ]


async def close(*opened):
    for endpoint in opened:
        await asyncio.to_thread(endpoint.abort)


WAITING = """
import asyncio, time, ucxx
from ucxx.types import Tag
import numpy as np
from shared.transfer.ucx import UcxContext

async def cpu_of_waiting(address):
    endpoint = await ucxx.create_endpoint_from_worker_address(ucxx.get_ucx_address_from_buffer(address))
    receive = asyncio.create_task(endpoint.recv(np.zeros(8, np.uint8), tag=Tag(1), force_tag=True))
    await asyncio.sleep(0.2)
    before = time.process_time()
    await asyncio.sleep(1.0)
    print(time.process_time() - before, flush=True)
    endpoint.abort()
    await asyncio.gather(receive, return_exceptions=True)

async def with_futures():
    async with UcxContext() as context:
        await cpu_of_waiting(context.address)

async def without():
    ucxx.init(progress_mode="thread")
    await cpu_of_waiting(ucxx.get_worker_address().tobytes())

asyncio.run({how}())
"""


def test_a_receive_that_waits_spins_unless_a_thread_completes_futures():
    ours = float(run_script(WAITING.replace("{how}", "with_futures")).stdout.split()[-1])
    spinning = float(run_script(WAITING.replace("{how}", "without")).stdout.split()[-1])
    assert ours < spinning / 5


LEAVING = """
import asyncio, ucxx
from shared.transfer.ucx import UcxContext

async def ours():
    async with UcxContext():
        pass

async def forgetful():
    ucxx.init(progress_mode="thread", enable_python_future=True)

asyncio.run({how}())
print("left the loop", flush=True)
"""


def test_a_process_hangs_at_its_exit_unless_the_notifier_thread_was_stopped():
    assert run_script(LEAVING.replace("{how}", "ours")).returncode == 0
    with pytest.raises(subprocess.TimeoutExpired) as hung:
        run_script(LEAVING.replace("{how}", "forgetful"), timeout_s=8.0)
    assert b"left the loop" in hung.value.stdout


async def test_after_a_receive_that_timed_out_the_next_of_its_tag_gets_the_old_bytes():
    async with UcxContext() as context:
        sender, receiver = await endpoints(context)
        first, second = np.zeros(8, np.uint8), np.zeros(8, np.uint8)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receiver.recv(first, tag=Tag(1), force_tag=True), 0.05)
        await sender.send(np.full(8, 1, np.uint8), tag=Tag(1), force_tag=True)
        await asyncio.wait_for(receiver.recv(second, tag=Tag(1), force_tag=True), TIMEOUT_S)
        assert second.tolist() == [1] * 8
        await close(sender, receiver)


async def test_a_tag_of_its_own_keeps_late_bytes_out_of_the_next_transfer():
    async with UcxContext() as context:
        sender, receiver = await endpoints(context)
        await sender.send(np.full(8, 1, np.uint8), tag=Tag(1), force_tag=True)
        buffer = np.zeros(8, np.uint8)
        receive = asyncio.create_task(receiver.recv(buffer, tag=Tag(2), force_tag=True))
        await sender.send(np.full(8, 2, np.uint8), tag=Tag(2), force_tag=True)
        await asyncio.wait_for(receive, TIMEOUT_S)
        assert buffer.tolist() == [2] * 8
        await close(sender, receiver)


async def test_tags_are_never_used_twice():
    async with UcxContext() as context:
        tags = [context.new_tag() for _ in range(1000)]
        assert len(set(tags)) == 1000
        assert len({tag >> 32 for tag in tags}) > 990, "the next one cannot be told from the last"
        assert all(0 < tag < 2**64 for tag in tags)


async def test_a_send_succeeds_though_nobody_receives():
    async with UcxContext() as context:
        sender, receiver = await endpoints(context)
        assert await asyncio.wait_for(sender.send(np.zeros(8, np.uint8), tag=Tag(1), force_tag=True), TIMEOUT_S) is None
        await close(sender, receiver)


class _Writer:
    """The stream half of a link that has none."""

    class transport:  # noqa: N801
        @staticmethod
        def abort():
            pass

    async def wait_closed(self):
        pass


async def test_a_cancelled_send_looks_like_a_success_and_is_an_error_here():
    async with UcxContext() as context:
        bare, unused = await endpoints(context)
        send = asyncio.create_task(bare.send(np.zeros(LARGE_BYTES, np.uint8), tag=Tag(1), force_tag=True))
        await asyncio.sleep(0.05)
        assert not send.done()
        bare._ep.close_blocking(period=10**9)
        assert await asyncio.wait_for(send, TIMEOUT_S) is None

        link = Link(None, _Writer(), time.monotonic, None)
        await link.open_endpoint(context.address)
        send = asyncio.create_task(link.send(2, torch.zeros(LARGE_BYTES, dtype=torch.uint8)))
        await asyncio.sleep(0.05)
        assert not send.done()
        await link.cut()
        with pytest.raises(KvTransferFailed):
            await asyncio.wait_for(send, TIMEOUT_S)
        await close(bare, unused)


async def test_a_cut_link_completes_a_posted_receive():
    async with UcxContext() as context:
        link = Link(None, _Writer(), time.monotonic, None)
        await link.open_endpoint(context.address)
        arrival = asyncio.create_task(link.receive(context.new_tag(), torch.zeros(8, dtype=torch.uint8)))
        await asyncio.sleep(0.05)
        assert not arrival.done()
        await link.cut()
        with pytest.raises(KvTransferFailed):
            await asyncio.wait_for(arrival, TIMEOUT_S)


async def test_a_link_that_is_cut_opens_no_endpoint_that_nobody_would_close():
    async with UcxContext() as context:
        link = Link(None, _Writer(), time.monotonic, None)
        await link.cut()
        with pytest.raises(KvTransferFailed):
            await link.open_endpoint(context.address)
        assert not link.has_endpoint


async def test_a_receive_that_is_cancelled_cuts_the_link_first():
    async with UcxContext() as context:
        link = Link(None, _Writer(), time.monotonic, None)
        await link.open_endpoint(context.address)
        arrival = asyncio.create_task(link.receive(context.new_tag(), torch.zeros(8, dtype=torch.uint8)))
        await asyncio.sleep(0.05)
        arrival.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(arrival, TIMEOUT_S)
        assert link.is_cut


async def test_a_receive_that_makes_no_progress_cuts_the_link(monkeypatch):
    monkeypatch.setattr(link_meter, "STALL_S", 0.05)
    async with UcxContext() as context:
        link = Link(None, _Writer(), time.monotonic, None)
        await link.open_endpoint(context.address)
        with pytest.raises(KvTransferFailed, match="no progress"):
            await asyncio.wait_for(link.receive(context.new_tag(), torch.zeros(8, dtype=torch.uint8)), TIMEOUT_S)
        assert link.is_cut


async def test_its_listener_binds_every_interface_so_we_do_not_use_it():
    async with UcxContext():
        ours = {c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert ours <= {"127.0.0.1"}
        listener = ucxx.create_listener(lambda endpoint: None, 0)
        assert listener.ip == "0.0.0.0"
        listener.close()
        del listener


async def test_a_process_has_one_context():
    async with UcxContext():
        with pytest.raises(RuntimeError, match="already"):
            await UcxContext().__aenter__()
    async with UcxContext():
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
async def test_device_memory_travels_without_a_copy_to_the_host():
    async with UcxContext() as context:
        sender, receiver = await endpoints(context)
        source = torch.randint(0, 255, (LARGE_BYTES,), dtype=torch.uint8, device="cuda")
        target = torch.zeros_like(source)
        torch.cuda.synchronize()
        receive = asyncio.create_task(receiver.recv(target, tag=Tag(1), force_tag=True))
        await asyncio.wait_for(sender.send(source, tag=Tag(1), force_tag=True), TIMEOUT_S)
        await asyncio.wait_for(receive, TIMEOUT_S)
        assert torch.equal(source, target)
        await close(sender, receiver)


def test_messages_in_flight_outlast_changes_of_the_threads_mode():
    async def change_for_ever(progress):
        while True:
            progress.hurry()
            await asyncio.sleep(1.5 * SPIN_S)

    async def scenario():
        async with UcxContext() as context:
            sender, receiver = await endpoints(context)
            changing = asyncio.create_task(change_for_ever(context.progress))
            for number in range(1, 41):
                sent = np.full(2**22, number, np.uint8)
                received = np.zeros_like(sent)
                arrival = asyncio.create_task(receiver.recv(received, tag=Tag(number), force_tag=True))
                await asyncio.sleep(0.3 * SPIN_S)
                async with asyncio.timeout(TIMEOUT_S):
                    await asyncio.gather(arrival, sender.send(sent, tag=Tag(number), force_tag=True))
                assert np.array_equal(received, sent)
            changing.cancel()
            await close(sender, receiver)

    asyncio.run(scenario())
