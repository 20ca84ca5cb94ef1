import os

import httpx
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from shared.runtime.run import health_routes


async def there() -> dict[str, bool]:
    return {"log": True}


async def ask(path, *report):
    app = Starlette(routes=health_routes(CollectorRegistry(), there, *report))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://it") as http:
        return await http.get(path)


async def test_a_service_without_a_report_is_well_when_it_answers():
    answer = await ask("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "pid": os.getpid()})


async def test_a_degraded_service_says_why_and_serves():
    report = {"status": "degraded", "links": [{"peer": "a", "warning": "no pid: host"}]}
    answer = await ask("/health", lambda: report)
    assert (answer.status_code, answer.json()) == (200, report | {"pid": os.getpid()})
    assert (await ask("/ready", lambda: report)).json() == {"ready": True, "log": True}
