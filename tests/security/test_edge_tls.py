"""HTTPS at the edge: what clients see, and what is refused at the start."""

import asyncio
import ssl

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from infra.docker import healthcheck
from services.stream_out.settings import Settings
from shared.errors import StartupError
from shared.runtime.access import ServerCertificate
from shared.runtime.run import serve_http
from tests.security.certificates import Authority


async def hello(_):
    return PlainTextResponse("hello")


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "secrets")


def served(signed):
    return serve_http(
        [Route("/", hello), Route("/ready", hello)],
        host="127.0.0.1",
        port=0,
        certificate=ServerCertificate(signed.cert, signed.key),
    )


async def get(port, context, scheme="https"):
    async with httpx.AsyncClient(verify=context) as client:
        return await client.get(f"{scheme}://127.0.0.1:{port}/")


async def test_a_client_that_trusts_the_authority_is_served(authority):
    async with served(authority.sign("edge")) as port:
        answer = await get(port, ssl.create_default_context(cafile=authority.cert))
    assert (answer.status_code, answer.text) == (200, "hello")


async def test_a_client_of_another_authority_hangs_up(authority, tmp_path):
    stranger = Authority(tmp_path / "other", "somebody else")
    async with served(authority.sign("edge")) as port:
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            await get(port, ssl.create_default_context(cafile=stranger.cert))


async def test_plain_text_is_not_served(authority):
    async with served(authority.sign("edge")) as port:
        with pytest.raises(httpx.TransportError):
            await get(port, ssl.create_default_context(), scheme="http")


@pytest.mark.filterwarnings(
    "ignore:ssl.TLSVersion.TLSv1:DeprecationWarning", "ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning"
)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_is_1_2_or_newer(authority, version):
    context = ssl.create_default_context(cafile=authority.cert)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # or this end would not speak the old ones at all
    context.minimum_version = version
    context.maximum_version = version
    async with served(authority.sign("edge")) as port:
        if version is ssl.TLSVersion.TLSv1_1:
            with pytest.raises(httpx.TransportError):
                await get(port, context)
        else:
            assert (await get(port, context)).status_code == 200


async def test_the_container_asks_itself_over_tls(authority, monkeypatch):
    async with served(authority.sign("edge", alternatives="DNS:edge.example.com")) as port:
        assert not await asyncio.to_thread(healthcheck.is_ready, port)
        assert await asyncio.to_thread(healthcheck.is_ready, port, tls=True)


@pytest.mark.parametrize("given", ["tls_cert", "tls_key"])
def test_half_a_certificate_is_refused(authority, given, monkeypatch, tmp_path):
    monkeypatch.setenv("BATON_MODEL", str(tmp_path))
    monkeypatch.setenv(f"BATON_{given.upper()}", str(authority.sign("edge").cert))
    with pytest.raises(StartupError, match="BATON_TLS_CERT and BATON_TLS_KEY go together"):
        Settings.read()


@pytest.mark.parametrize("wrong", ["missing", "no certificate", "the key of another", "encrypted"])
async def test_a_certificate_that_does_not_work_is_refused_at_the_start(authority, tmp_path, wrong):
    signed = authority.sign("edge")
    files = {"cert": signed.cert, "key": signed.key}
    if wrong == "missing":
        files["cert"] = tmp_path / "missing"
    elif wrong == "no certificate":
        files["cert"] = tmp_path / "text"
        files["cert"].write_text("text")
    elif wrong == "the key of another":
        files["key"] = authority.sign("other").key
    else:
        files["key"] = authority.encrypted(signed)
    with pytest.raises(StartupError, match=str(files["cert"])):
        async with serve_http([], host="127.0.0.1", port=0, certificate=ServerCertificate(**files)):
            pass
