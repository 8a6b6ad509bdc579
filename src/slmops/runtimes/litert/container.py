"""Where the program lies inside a ``.litertlm`` file.

Source of the layout: LiteRT-LM, ``schema/core/litertlm_header_schema.fbs`` (version 1): eight bytes of magic, three
version numbers, four bytes of padding, where the header ends, then the header as a FlatBuffer.
"""

from __future__ import annotations

import struct
from pathlib import Path

import flatbuffers
from flatbuffers.table import Table

from slmops.core.errors import RuntimeLoadError

_MAGIC = b"LITERTLM"
_HEAD = struct.Struct("<8sIIIIQ")
_PROGRAM_MAGIC = b"TFL3"  # at byte 4 of a FlatBuffer that holds a LiteRT program
_MAX_HEADER_BYTES = 1 << 20
_SECTION_METADATA, _OBJECTS, _BEGIN, _END = 6, 4, 6, 8  # places in the vtables


def read_program(path: Path) -> bytes:
    """The one program in a container.

    Raises:
        RuntimeLoadError: it is no container, cut off, or holds another number of programs.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size or not head.startswith(_MAGIC):
            raise RuntimeLoadError(
                f"failed to load model: {path.name} is no .litertlm file", hint="export the model again"
            )
        _, major, _, _, _, end = _HEAD.unpack(head)
        if major != 1 or not _HEAD.size < end <= min(size, _MAX_HEADER_BYTES):
            raise RuntimeLoadError(
                f"failed to load model: {path.name} has version {major} of the format, expected 1, or is cut off",
                hint="export the model again",
            )
        programs = []
        for begin, finish in _sections(file.read(end - _HEAD.size), path.name):
            if not _HEAD.size <= begin < finish <= size:
                raise RuntimeLoadError(
                    f"failed to load model: {path.name} is cut off: a part ends at {finish} of {size} bytes",
                    hint="fetch the file again",
                )
            file.seek(begin)
            if file.read(8)[4:] == _PROGRAM_MAGIC:
                programs.append((begin, finish))
        if len(programs) != 1:
            raise RuntimeLoadError(
                f"failed to load model: {path.name} holds {len(programs)} programs, expected 1",
                hint="export it without a separate embedder or vision part",
            )
        begin, finish = programs[0]
        file.seek(begin)
        return file.read(finish - begin)


def _sections(header: bytes, name: str) -> list[tuple[int, int]]:
    """Begin and end of each section."""
    try:
        (root,) = struct.unpack_from("<I", header)
        metadata = _child(Table(header, root), _SECTION_METADATA)
        place = metadata.Offset(_OBJECTS)
        start, count = metadata.Vector(place), metadata.VectorLen(place)
        sections = []
        for index in range(count):
            section = Table(header, metadata.Indirect(start + 4 * index))
            places = (section.Offset(_BEGIN), section.Offset(_END))
            sections.append(
                tuple(
                    int(section.Get(flatbuffers.number_types.Uint64Flags, section.Pos + place))
                    if place
                    else 0
                    for place in places
                )
            )
        return [(begin, end) for begin, end in sections]
    except (struct.error, IndexError, ValueError, TypeError) as error:
        raise RuntimeLoadError(
            f"failed to load model: the header of {name} cannot be read: {type(error).__name__}",
            hint="fetch the file again",
        ) from error


def _child(table: Table, place: int) -> Table:
    offset = table.Offset(place)
    if not offset:
        raise ValueError("missing")
    return Table(table.Bytes, table.Indirect(table.Pos + offset))
