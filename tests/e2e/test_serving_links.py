"""What the workers of a running stack tell of their links."""

import asyncio

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_each_worker_has_measured_its_links_to_all_others_and_says_by_what_they_go(serving):
    await serving.all_ready()
    workers = serving.stack.addresses("prefill") + serving.stack.addresses("decode")
    for address in workers:
        told = await linked(serving, address, len(workers) - 1)
        assert told["status"] == "ok"
        for link in told["links"]:
            assert (link["transport"], link["below_floor"], link["warning"]) == ("tcp", False, None)
            assert link["gb_per_s"] > 0
            assert 0 < link["latency_us"] < 1e6
        metrics = await serving.metrics(address)
        all_bytes_per_s = sum(link["gb_per_s"] for link in told["links"]) * 1e9
        assert metrics["baton_kv_link_bytes_per_second"] == pytest.approx(all_bytes_per_s, rel=1e-3)
        assert metrics["baton_kv_links_missing"] == 0


async def linked(serving, address, num_links):
    """What a worker tells once it has measured so many links: those that only prefixes come by, behind its start."""
    async with asyncio.timeout(30):
        while True:
            told = (await serving.http.get(f"{address}/health")).json()
            if sum(link["gb_per_s"] is not None for link in told["links"]) == num_links:
                return told
            await asyncio.sleep(0.2)
