"""Answers by msgspec: the records of ``slmops.client`` are the one definition of what goes over the wire.

FastAPI knows pydantic models only, so the OpenAPI document gets these schemas from msgspec.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.responses import Response

from slmops.protocol.messages import CheckinRequest, CheckinResponse, EnrollRequest, EnrollResponse, Problem
from slmops.server.api.problems import MEDIA_TYPE

_ENCODER = msgspec.json.Encoder()
_TEMPLATE = "#/components/schemas/{name}"
#: every record that a route answers with
_RECORDS: list[Any] = []

#: routes that FastAPI does not know, because they pass it by
DEVICE_ROUTES: dict[str, tuple[str, Any, Any, str]] = {
    "/v1/enroll": (
        "Take a new device in (enrolment token in the body)",
        EnrollRequest,
        EnrollResponse,
        "201",
    ),
    "/v1/checkin": (
        "A device says where it stands (Bearer JWT signed with the device's key); 204 when nothing changed",
        CheckinRequest,
        CheckinResponse,
        "200",
    ),
}


def _device_operation(summary: str, request: Any, response: Any, status: str) -> dict[str, Any]:
    def content(kind: Any, media_type: str = "application/json") -> dict[str, Any]:
        return {media_type: {"schema": {"$ref": _TEMPLATE.format(name=kind.__name__)}}}

    return {
        "tags": ["device side"],
        "summary": summary,
        "requestBody": {"required": True, "content": content(request)},
        "responses": {
            status: {"description": "Accepted", "content": content(response)},
            "default": {"description": "A problem document", "content": content(Problem, MEDIA_TYPE)},
        },
    }


def answer(value: Any, status: int = 200) -> Response:
    """A JSON response of a record, or a list of them."""
    return Response(_ENCODER.encode(value), status, media_type="application/json")


def documented(kind: Any, status: int = 200, description: str = "Done") -> dict[int | str, dict[str, Any]]:
    """``responses=`` of a route that answers with this record."""
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_TEMPLATE)
    _RECORDS.append(kind)
    return {status: {"description": description, "content": {"application/json": {"schema": schema}}}}


def install_schemas(app: FastAPI) -> None:
    """Put the schemas of all records that routes answer with into ``/openapi.json``."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        document = original()
        kinds: list[Any] = [Problem, *_RECORDS]
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                problem = {MEDIA_TYPE: {"schema": {"$ref": _TEMPLATE.format(name="Problem")}}}
                operation["responses"]["default"] = {"description": "A problem document", "content": problem}
        for path, (summary, request, response, status) in DEVICE_ROUTES.items():
            kinds += [request, response]
            document["paths"][path] = {"post": _device_operation(summary, request, response, status)}
        _, components = msgspec.json.schema_components(kinds, ref_template=_TEMPLATE)
        document.setdefault("components", {}).setdefault("schemas", {}).update(components)
        app.openapi_schema = document
        return document

    app.openapi = openapi  # type: ignore[method-assign]
