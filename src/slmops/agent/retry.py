"""Trying again: exponential pauses with jitter, for errors that say that it is worth it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from slmops.core.errors import DigestError, SlmopsError, TransientError

log = logging.getLogger("slmops.agent")

Result = TypeVar("Result")

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 300.0
#: a chunk that hashes wrongly may come from one damaged cache; after this many the device gives up
DIGEST_ATTEMPTS = 3


def pause_s(attempt: int, chance: random.Random) -> float:
    """Pause before attempt number ``attempt`` (from 1): doubles, with up to half of it taken off at random."""
    whole: float = min(FIRST_PAUSE_S * 2.0 ** (attempt - 1), LONGEST_PAUSE_S)
    return whole * (1 - chance.random() / 2)


async def until_reached(what: str, act: Callable[[], Awaitable[Result]], chance: random.Random) -> Result:
    """Repeat an act for ever while it fails transiently, and a few times while its bytes are wrong.

    Raises:
        SlmopsError: an error that another try cannot mend.
    """
    attempt = digests = 0
    while True:
        try:
            return await act()
        except TransientError as error:
            attempt += 1
            reason: SlmopsError = error
        except DigestError as error:
            digests += 1
            attempt += 1
            reason = error
            if digests >= DIGEST_ATTEMPTS:
                raise
        wait = pause_s(attempt, chance)
        asked = reason.fields.get("retry_after_s")
        if isinstance(asked, (int, float)):
            wait = max(wait, float(asked))
        log.warning("%s: %s; again in %.1f s", what, reason.message, wait)
        await asyncio.sleep(wait)
