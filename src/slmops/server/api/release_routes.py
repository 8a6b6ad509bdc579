"""Operator routes about blobs and releases."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from slmops.artifact.digest import is_digest
from slmops.client.records import Promotion, ReleaseDetail, ReleaseRecord
from slmops.core.errors import UsageError
from slmops.server.api.answers import answer, documented
from slmops.server.api.callers import Operator, Served, Viewer
from slmops.server.services.words import Role

MAX_BLOB_BYTES = 64 << 20
MAX_QUESTIONS = 20_000

router = APIRouter(prefix="/v1", tags=["releases"])


class BlobQuestion(BaseModel):
    """Digests to ask about."""

    model_config = ConfigDict(extra="forbid")

    sha256: list[str] = Field(max_length=MAX_QUESTIONS)


class ReleaseUpload(BaseModel):
    """A signed release; its blobs were uploaded before."""

    model_config = ConfigDict(extra="forbid")

    target_path: str = Field(description="Of the manifest in the targets metadata")
    targets: str = Field(description="The new targets metadata, signed by the release keys, as text")
    manifest: str = Field(description="Canonical bytes of the release manifest, as text")


class ChannelWanted(BaseModel):
    """The channel to point at a release."""

    model_config = ConfigDict(extra="forbid")

    channel: str


_MISSING: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Those that are not here",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}


@router.post("/blobs/missing", responses=_MISSING)
def missing(question: BlobQuestion, services: Served, caller: Operator) -> Response:
    """Which of these blobs are not here yet."""
    caller.require(Role.OPERATOR, "asking for missing blobs")
    wrong = next((digest for digest in question.sha256 if not is_digest(digest)), None)
    if wrong is not None:
        raise UsageError(
            f"{wrong[:80]!r} is not a SHA-256 in lower-case hex", hint="name blobs by their digests"
        )
    return answer({"missing": services.chunks.missing(question.sha256)})


@router.put("/blobs/sha256/{sha256}", status_code=201, response_class=Response)
async def put_blob(sha256: str, request: Request, services: Served, caller: Operator) -> Response:
    """Take a blob in: 201 when it is new, 204 when it was here. Nothing half-written is ever visible."""
    caller.require(Role.OPERATOR, "uploading")
    announced = request.headers.get("content-length", "")
    expected_bytes = int(announced) if announced.isascii() and announced.isdigit() else None
    if expected_bytes is not None and expected_bytes > MAX_BLOB_BYTES:
        raise _too_large(expected_bytes)
    if services.chunks.size(sha256) is not None:
        return Response(status_code=204)
    taken_bytes = 0
    with services.chunks.upload(sha256, expected_bytes) as upload:
        async for piece in request.stream():
            taken_bytes += len(piece)
            if taken_bytes > MAX_BLOB_BYTES:
                raise _too_large(taken_bytes)
            upload.write(piece)
        await run_in_threadpool(upload.commit)
    return Response(status_code=201)


@router.post("/releases", status_code=201, responses=documented(ReleaseRecord, 201))
def publish(upload: ReleaseUpload, services: Served, caller: Operator) -> Response:
    """Publish a signed release whose blobs are all here."""
    record = services.catalogue.publish(caller, upload.target_path, upload.targets, upload.manifest)
    return answer(record, 201)


@router.get("/releases", responses=documented(list[ReleaseRecord]))
def releases(services: Served, caller: Viewer, model: str | None = None) -> Response:
    """Published releases, newest first."""
    return answer(services.catalogue.records(model))


@router.get("/releases/{model}/{version}", responses=documented(ReleaseDetail))
def release(model: str, version: str, services: Served, caller: Viewer) -> Response:
    """One release with its variants and evidence."""
    return answer(services.catalogue.detail(model, version))


@router.post("/releases/{model}/{version}/promote", responses=documented(Promotion))
def promote(model: str, version: str, wanted: ChannelWanted, services: Served, caller: Operator) -> Response:
    """Point a channel at a release; each blueprint that follows it begins a rollout."""
    return answer(services.blueprints.promote(caller, model, version, wanted.channel))


def _too_large(size_bytes: int) -> UsageError:
    return UsageError(
        f"blob has {size_bytes} bytes or more, {MAX_BLOB_BYTES} are allowed",
        hint="artifacts are uploaded in chunks: slmops release publish does",
        allowed_bytes=MAX_BLOB_BYTES,
    )
