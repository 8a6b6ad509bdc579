"""Getting files onto the device, and getting damaged ones back: only the pieces that are missing or damaged move.

Everything is content-addressed, so a repair needs no new offer: a document is fetched again by its digest, and of the
weights the chunk map says which chunks are damaged.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from slmops.agent.ports import ControlPlane
from slmops.agent.retry import until_reached
from slmops.agent.serving import EngineKeeper
from slmops.agent.store.artifacts import ArtifactStore, LocalChunks
from slmops.agent.store.files import free_bytes
from slmops.agent.store.layout import Layout
from slmops.agent.store.slots import Slot, read_slot
from slmops.artifact.chunkmap import ChunkMap, decode_chunk_map
from slmops.core.device.machine import SlotName
from slmops.core.errors import NoSpaceError

log = logging.getLogger("slmops.agent")

#: disk kept free beside the files of a release: journal, slots, logs
DISK_MARGIN_BYTES = 8 << 20
#: longest document of a release whose size its slot does not tell
MAX_DOCUMENT_BYTES = 8 << 20
SLOTS: tuple[SlotName, SlotName] = ("a", "b")

Fetch = Callable[[str, int], Awaitable[bytes]]


class Fetching:
    """Fetches for one device."""

    def __init__(
        self,
        layout: Layout,
        store: ArtifactStore,
        server: ControlPlane,
        keeper: EngineKeeper,
        chance: random.Random,
    ) -> None:
        """Wire the parts."""
        self._layout, self._store, self._server = layout, store, server
        self._keeper, self._chance = keeper, chance
        #: bytes fetched over the network since the start
        self.fetched_bytes = 0

    async def once(self, sha256: str, size_bytes: int) -> bytes:
        """Fetch a chunk or a document, one try."""
        content = await self._server.fetch_chunk(sha256, size_bytes)
        self.fetched_bytes += len(content)
        return content

    async def patiently(self, sha256: str, size_bytes: int) -> bytes:
        """Fetch a chunk, for as long as it takes to reach the control plane."""
        return await until_reached(
            f"chunk {sha256[:12]}", lambda: self.once(sha256, size_bytes), self._chance
        )

    async def complete(self, chunk_map: ChunkMap, fetch: Fetch) -> bool:
        """See to it that all bytes of a file are on disk; what is damaged is fetched again.

        Returns:
            Whether the whole file was there already, by its hash.

        Raises:
            NoSpaceError: what is missing does not fit; nothing that serves was touched.
        """
        sha256 = chunk_map.artifact_sha256
        if self._store.has(sha256):
            if await asyncio.to_thread(self._store.is_whole, sha256):
                return True
            log.warning("artifact %s was damaged on disk: its damaged chunks are fetched again", sha256[:12])
            await asyncio.to_thread(self._store.salvage, chunk_map, in_place=not self._keeper.uses(sha256))
        assembly = self._store.assembly(chunk_map)
        needed, free = assembly.missing_bytes - assembly.reserved_bytes, free_bytes(self._layout.root)
        if needed > 0 and needed + DISK_MARGIN_BYTES > free:
            raise NoSpaceError(
                f"{needed} bytes are missing, {free} are free",
                hint="free some disk; the device keeps serving what it has",
            )
        local = await asyncio.to_thread(LocalChunks, self._store, self._local_files())
        for index, offset, chunk, size in list(assembly.missing()):
            content = await asyncio.to_thread(local.get, chunk)
            if content is None:
                content = await fetch(chunk, size)
            await asyncio.to_thread(assembly.write, index, offset, content)
        return False

    def _local_files(self) -> list[tuple[str, str]]:
        """Files on this device whose chunks may be taken."""
        slots = [slot for name in SLOTS if (slot := read_slot(self._layout, name)) is not None]
        return [(a.sha256, a.chunk_map) for slot in slots for a in slot.artifacts if a.chunk_map]

    async def mend(self, slot: Slot) -> None:
        """Make every file of a slot whole again, one try.

        Raises:
            SlmopsError: something is damaged and could not be had now.
        """
        await self.mend_documents(slot)
        for artifact in slot.artifacts:
            if not artifact.chunk_map:
                continue
            chunk_map = decode_chunk_map(await asyncio.to_thread(self._store.read_blob, artifact.chunk_map))
            if not await self.complete(chunk_map, self.once):
                await asyncio.to_thread(self._store.assembly(chunk_map).finish)

    async def mend_documents(self, slot: Slot) -> None:
        """The same for what is small: manifests, chunk map, golden pack, prompts."""
        for artifact in slot.artifacts:
            if artifact.chunk_map:
                continue
            if await asyncio.to_thread(self._store.is_whole, artifact.sha256):
                continue
            log.warning("%s was damaged on disk: it is fetched again", artifact.role)
            content = await self.once(artifact.sha256, artifact.bytes or MAX_DOCUMENT_BYTES)
            await asyncio.to_thread(self._store.put_blob, artifact.sha256, content)
