from types import SimpleNamespace

import orjson
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from services.stream_out.app import SINGLE_HEADERS, TENANT_HEADER, TIMEOUT_HEADER, Api
from services.stream_out.openapi import openapi_document
from shared import errors
from shared.runtime.run import health_routes


def routes_of_the_app():
    edge = SimpleNamespace(settings=None, clock_s=lambda: 0.0, metrics=None, logger=None)
    routes = [*health_routes(CollectorRegistry(), dict), *Api(edge, None).routes()]
    assert all(isinstance(route, Route) for route in routes)
    return {
        (route.path.replace(":path", ""), method.lower())
        for route in routes
        for method in route.methods
        if method != "HEAD"
    }


def operations():
    return {
        (path, method): operation
        for path, methods in openapi_document()["paths"].items()
        for method, operation in methods.items()
    }


def request_errors(base=errors.RequestError):
    for error in base.__subclasses__():
        yield error
        yield from request_errors(error)


def test_every_route_is_described_and_nothing_else_is():
    assert operations().keys() == routes_of_the_app()


def test_the_document_is_json():
    assert orjson.loads(orjson.dumps(openapi_document())) == openapi_document()


def test_every_refusal_has_its_status_in_the_document():
    described = operations()["/v1/chat/completions", "post"]["responses"].keys()
    assert {str(error.http_status) for error in request_errors()} <= described
    assert {
        "200",
        "400",
        "401",
        "403",
        "404",
        "408",
        "409",
        "413",
        "415",
        "429",
        "499",
        "500",
        "503",
        "504",
    } == described


def test_every_reference_leads_somewhere():
    document = openapi_document()
    refs = {text.split('"')[0] for text in orjson.dumps(document).decode().split('"$ref":"')[1:]}
    schemas = document["components"]["schemas"]
    assert {ref.removeprefix("#/components/schemas/") for ref in refs} <= schemas.keys()
    assert refs


def test_every_header_that_means_something_is_described():
    parameters = operations()["/v1/completions", "post"]["parameters"]
    described = {parameter["name"].lower() for parameter in parameters if parameter["in"] == "header"}
    assert set(SINGLE_HEADERS) - {"authorization"} == described - {"traceparent"}
    assert {TENANT_HEADER, TIMEOUT_HEADER} <= described
