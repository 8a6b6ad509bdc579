"""Open and immutable: signed metadata and chunks. Trust comes from signatures and hashes, not from who asks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from slmops.artifact.digest import is_digest
from slmops.core.errors import NotFoundError, UsageError
from slmops.server.api.callers import Served
from slmops.server.api.problems import plain_problem, problem_response

IMMUTABLE = "public, max-age=31536000, immutable"
_RANGE = re.compile(r"^bytes=(\d{0,18})-(\d{0,18})\Z")

router = APIRouter(prefix="/v1", tags=["content"])


@router.get("/tuf/{name}", response_class=Response)
def tuf_file(name: str, services: Served) -> Response:
    """One file of TUF metadata: ``timestamp.json``, ``N.root.json``, ``N.targets.json``, ``N.snapshot.json``."""
    content = services.publication.file(name)
    caching = "no-cache" if name == "timestamp.json" else IMMUTABLE
    return Response(content, headers={"Cache-Control": caching}, media_type="application/json")


@router.head("/chunks/sha256/{sha256}", response_class=Response)
@router.get("/chunks/sha256/{sha256}", response_class=Response)
def chunk(sha256: str, request: Request, services: Served) -> Response:
    """One blob, whole or in a range."""
    if not is_digest(sha256):
        raise UsageError(
            f"{sha256[:80]!r} is not a SHA-256 in lower-case hex", hint="name a chunk by its digest"
        )
    size = services.chunks.size(sha256)
    if size is None:
        raise NotFoundError(
            f"no chunk has sha256 {sha256}", hint="is the release published on this control plane?"
        )
    headers = {"ETag": f'"{sha256}"', "Cache-Control": IMMUTABLE, "Accept-Ranges": "bytes"}
    if f'"{sha256}"' in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    begin, end, status = 0, size, 200
    wanted = request.headers.get("range")
    if_range = request.headers.get("if-range")
    if wanted is not None and (if_range is None or if_range == f'"{sha256}"'):
        found = byte_range(wanted, size)
        if found is None:
            headers["Content-Range"] = f"bytes */{size}"
            detail = f"range {wanted} of {size} bytes"
            return problem_response(
                plain_problem(416, "usage.range", "Range cannot be satisfied", detail), headers
            )
        begin, end = found
        if (begin, end) != (0, size):
            status = 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - begin)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type="application/octet-stream")
    pieces: Iterator[bytes] = services.chunks.read(sha256, begin, end - begin)
    return StreamingResponse(pieces, status, headers, media_type="application/octet-stream")


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """The range that a header asks for, as (begin, end) with the end outside; the whole when it asks for several.

    None when it cannot be satisfied. Source: RFC 9110, section 14.
    """
    if "," in header or not header.startswith("bytes="):
        return 0, size
    match = _RANGE.match(header.replace(" ", ""))
    if match is None or (not match[1] and not match[2]):
        return 0, size
    if not match[1]:
        last = int(match[2])
        return None if last == 0 or size == 0 else (max(size - last, 0), size)
    begin = int(match[1])
    end = int(match[2]) + 1 if match[2] else size
    if begin >= size or end <= begin:
        return None
    return begin, min(end, size)
