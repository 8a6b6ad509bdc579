"""Values that several services and both surfaces share: roles, callers, times as text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

from slmops.core.errors import PermissionDeniedError, UsageError


class Role(IntEnum):
    """What an operator may do; each role may do all that the lower ones may."""

    VIEWER = 1
    OPERATOR = 2
    APPROVER = 3
    ADMIN = 4


def role_named(name: str) -> Role:
    """A role by its name.

    Raises:
        UsageError: there is no such role.
    """
    try:
        return Role[name.upper()]
    except KeyError as error:
        roles = ", ".join(role.name.lower() for role in Role)
        raise UsageError(f"role {name!r} is not known", hint=f"one of {roles}") from error


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking."""

    name: str
    role: Role

    def require(self, role: Role, what: str) -> None:
        """Check that the caller may do something.

        Raises:
            PermissionDeniedError: its role is lower.
        """
        if self.role < role:
            raise PermissionDeniedError(
                f"{what} needs the role {role.name.lower()}, {self.name} has {self.role.name.lower()}",
                hint=f"use a token made with: slmops server token create --role {role.name.lower()}",
                needed=role.name.lower(),
                actual=self.role.name.lower(),
            )


#: who acts when nobody asked
SERVER = Caller("server", Role.ADMIN)


def rfc3339(moment: datetime | None) -> str:
    """A UTC time as text; empty for none."""
    return "" if moment is None else moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def token_hash(token: str) -> str:
    """How a token is stored: it has 256 random bits, so a plain hash cannot be searched backwards."""
    return hashlib.sha256(token.encode()).hexdigest()
