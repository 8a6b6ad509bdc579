"""Reading a request's body: bounded in bytes and in time, while it arrives, so that no client can fill a small device."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from slmops.agent.gateway.requests import MAX_BODY_BYTES, BadRequest

#: a client that sends nothing for this long does not get to send the rest, seconds
STALL_TIMEOUT_S = 30.0


class ClientGone(Exception):
    """The client hung up before it had asked."""


async def read_body(request: Request) -> bytearray:
    """The whole body.

    Raises:
        BadRequest: 413 when it is too long, by what it announces or by what has arrived; 408 when it stalls.
        ClientGone: the client hung up.
    """
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > MAX_BODY_BYTES:
        raise _too_long(f"announces {announced}")
    body = bytearray()
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), STALL_TIMEOUT_S)
        except asyncio.TimeoutError as error:
            raise BadRequest(
                408,
                f"the rest of the request did not arrive within {STALL_TIMEOUT_S:g} s",
                code="request_timeout",
            ) from error
        if message["type"] != "http.request":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise _too_long(f"has more than {MAX_BODY_BYTES}")
        if not message.get("more_body", False):
            return body


def _too_long(has: str) -> BadRequest:
    return BadRequest(413, f"the request {has} bytes, {MAX_BODY_BYTES} are allowed", code="request_too_large")
