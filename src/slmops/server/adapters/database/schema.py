"""Tables. Changed only together with a migration: a test compares this file with the sum of the migrations."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)


class Moment(TypeDecorator[datetime]):
    """A UTC time as microseconds since 1970: exact, sortable and the same in every database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """To microseconds; a naive time is a bug and raises."""
        return None if value is None else (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        """From microseconds."""
        return None if value is None else _EPOCH + int(value) * _MICROSECOND


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_Digest = String(64)
_Name = String(128)

devices = Table(
    "devices",
    metadata,
    Column("id", _Name, primary_key=True),
    Column("profile", _Name, nullable=False),
    Column("labels", Text, nullable=False),
    Column("public_key_pem", Text, nullable=False),
    Column("enrolment_token_sha256", _Digest, nullable=False),
    Column("enrolled_at", Moment, nullable=False),
    Column("retired_at", Moment),
    Column("facts", Text, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("delivered_generation", BigInteger, nullable=False),
    Column("assignment", Text),
    Column("last_seen_at", Moment),
    Column("boot_id", _Name, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("content_sha256", _Digest, nullable=False),
    Column("reported_generation", BigInteger, nullable=False),
    Column("phase", String(32), nullable=False),
    Column("running", _Digest, nullable=False),
    Column("release_sha256", _Digest, nullable=False),
    Column("candidate", _Digest, nullable=False),
    Column("fetched_bytes", BigInteger, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("failed_requests", BigInteger, nullable=False),
    Column("stale_since", String(40), nullable=False),
    Index(None, "enrolment_token_sha256"),
)

assignments = Table(
    "assignments",
    metadata,
    Column("device_id", _Name, ForeignKey("devices.id"), primary_key=True),
    Column("generation", BigInteger, primary_key=True),
    Column("action", String(16), nullable=False),
    Column("assignment_digest", _Digest, nullable=False),
    Column("rollout_id", _Name, nullable=False),
    Column("body", Text, nullable=False),
    Column("issued_at", Moment, nullable=False),
    Index(None, "assignment_digest"),
)

outcomes = Table(
    "outcomes",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("device_id", _Name, ForeignKey("devices.id"), nullable=False),
    Column("rollout_id", _Name, nullable=False),
    Column("assignment_digest", _Digest, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("status", String(16), nullable=False),
    Column("body", Text, nullable=False),
    Column("received_at", Moment, nullable=False),
    UniqueConstraint("device_id", "generation", "assignment_digest", "status", "rollout_id"),
    Index(None, "rollout_id"),
)

enrolment_tokens = Table(
    "enrolment_tokens",
    metadata,
    Column("sha256", _Digest, primary_key=True),
    Column("uses", Integer, nullable=False),
    Column("used", Integer, nullable=False),
    Column("expires_at", Moment, nullable=False),
    Column("labels", Text, nullable=False),
    Column("created_by", _Name, nullable=False),
    Column("created_at", Moment, nullable=False),
)

operator_tokens = Table(
    "operator_tokens",
    metadata,
    Column("sha256", _Digest, primary_key=True),
    Column("name", _Name, nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("expires_at", Moment),
)

sessions = Table(
    "sessions",
    metadata,
    Column("sha256", _Digest, primary_key=True),
    Column("token_sha256", _Digest, ForeignKey("operator_tokens.sha256"), nullable=False),
    Column("expires_at", Moment, nullable=False),
)

releases = Table(
    "releases",
    metadata,
    Column("digest", _Digest, primary_key=True),
    Column("model", _Name, nullable=False),
    Column("version", _Name, nullable=False),
    Column("release_seq", BigInteger, nullable=False),
    Column("target_path", String(300), nullable=False, unique=True),
    Column("manifest", Text, nullable=False),
    Column("published_at", Moment, nullable=False),
    Column("published_by", _Name, nullable=False),
    UniqueConstraint("model", "version"),
)

channels = Table(
    "channels",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("model", _Name, nullable=False),
    Column("channel", _Name, nullable=False),
    Column("release_digest", _Digest, ForeignKey("releases.digest"), nullable=False),
    Column("set_at", Moment, nullable=False),
    Column("set_by", _Name, nullable=False),
    Index(None, "model", "channel"),
)

blueprints = Table(
    "blueprints",
    metadata,
    Column("name", _Name, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("source", Text, nullable=False),
    Column("source_name", String(300), nullable=False),
    Column("applied_at", Moment, nullable=False),
    Column("applied_by", _Name, nullable=False),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", _Name, nullable=False, unique=True),
    Column("blueprint", _Name, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("model", _Name, nullable=False),
    Column("version", _Name, nullable=False),
    Column("release_digest", _Digest, ForeignKey("releases.digest"), nullable=False),
    Column("phase", String(32), nullable=False),
    Column("wave", Integer, nullable=False),
    Column("since", Moment, nullable=False),
    Column("approved_by", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("resume_to", String(32)),
    Column("created_at", Moment, nullable=False),
    Column("created_by", _Name, nullable=False),
    Column("row_version", Integer, nullable=False),
    Column("holdback", Text, nullable=False),
    Column("ended_at", Moment),
    Column("judgement", Text),
    Index(None, "blueprint"),
    Index(None, "phase"),
)

members = Table(
    "rollout_members",
    metadata,
    Column("rollout_id", _Name, ForeignKey("rollouts.id"), primary_key=True),
    Column("device_id", _Name, ForeignKey("devices.id"), primary_key=True),
    Column("wave", Integer, nullable=False),
    Column("position", Integer, nullable=False),
    Column("status", String(16), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("assignment_digest", String(64), nullable=False),
    Column("variant_sha256", String(64), nullable=False),
    Column("variant_profile", _Name, nullable=False),
    Column("tried", Text, nullable=False),
    Column("prior_running", String(64), nullable=False),
    Column("running_matches", Integer, nullable=False),
    Column("cause", String(16), nullable=False),
    Column("code", String(64), nullable=False),
    Column("detail", Text, nullable=False),
    Column("offered_at", Moment),
    Column("acknowledged_at", Moment),
    Column("settled_at", Moment),
    Column("golden", Text),
    Column("ratios", Text, nullable=False),
    Column("revert", String(16), nullable=False),
    Column("revert_generation", BigInteger, nullable=False),
    Index(None, "revert"),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("rollout_id", _Name, ForeignKey("rollouts.id"), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("arguments", Text, nullable=False),
    Column("posted_at", Moment, nullable=False),
    Column("done_at", Moment),
    Index(None, "done_at"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Moment, nullable=False),
    Column("kind", String(64), nullable=False),
    Column("subject", _Name, nullable=False),
    Column("detail", Text, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Moment, nullable=False),
    Column("actor", _Name, nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(300), nullable=False),
    Column("detail", Text, nullable=False),
)

facts = Table(
    "facts",
    metadata,
    Column("name", _Name, primary_key=True),
    Column("value", Text, nullable=False),
)
