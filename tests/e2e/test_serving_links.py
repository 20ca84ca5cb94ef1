"""What the decode workers of a running stack tell of their links."""

import httpx
import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_each_decode_worker_has_measured_its_link_and_says_by_what_it_goes(serving):
    await serving.all_ready()
    decodes = serving.stack.addresses("decode")
    assert decodes
    for address in decodes:
        told = (await serving.http.get(f"{address}/health")).json()
        assert told["status"] == "ok"
        (link,) = told["links"]
        assert (link["transport"], link["below_floor"], link["warning"]) == ("tcp", False, None)
        assert link["gb_per_s"] > 0
        assert 0 < link["latency_us"] < 1e6
        metrics = await serving.metrics(address)
        assert metrics["baton_kv_link_bytes_per_second"] == pytest.approx(link["gb_per_s"] * 1e9, rel=1e-3)
        assert metrics["baton_kv_links_missing"] == 0


async def test_a_prefill_worker_has_no_links_of_its_own(serving):
    await serving.all_ready()
    (address,) = serving.stack.addresses("prefill")
    answer = await serving.http.get(f"{address}/health")
    assert (answer.status_code, answer.json()["links"]) == (httpx.codes.OK, [])
    assert (await serving.metrics(address))["baton_kv_links_missing"] == 0
