"""Quantities as people write them: ``85MB``, ``512MiB``, ``10%``."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

_BYTES = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?\s*")
_UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


def parse_bytes(value: Any) -> Any:
    """``85MB`` is 85,000,000 and ``85MiB`` is 89,128,960; a bare number is bytes."""
    if not isinstance(value, str):
        return value
    match = _BYTES.fullmatch(value)
    if match is None:
        raise ValueError(f"{value!r} is not a size: write 85MB, 512MiB or a number of bytes")
    return int(Decimal(match[1]) * _UNITS[match[2] or "B"])


def parse_ratio(value: Any) -> Any:
    """``10%`` is 0.1; a bare number must already be 0..1."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError as error:
            raise ValueError(f"{value!r} is not a percentage: write 10%") from error
    return value


# Field comes behind the validator: the other way round a field's own bounds would be dropped without a word.
#: a size in bytes; the published schema allows what people write
Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    Field(gt=0, lt=1 << 53),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([kKMGT]B|[KMGT]iB|B)?\s*$"},
            ],
            "description": "bytes: 85MB, 512MiB or a number",
        }
    ),
]
#: a share of one
Ratio = Annotated[
    float,
    BeforeValidator(parse_ratio),
    Field(ge=0, le=1),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*%$"},
            ],
            "description": "0..1, or a percentage: 10%",
        }
    ),
]
#: name of a document, a profile or a model: becomes part of paths and addresses
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class Section(BaseModel):
    """Base of every part of a document: unknown keys are errors, so that a typo is not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Metadata(Section):
    """``metadata:`` of a document."""

    name: Name
    labels: dict[str, str] = {}
