"""Ranges, labels, roles, page helpers, migrations: small rules with sharp edges."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from slmops.core.errors import (
    BusyError,
    NotFoundError,
    PermissionDeniedError,
    UsageError,
    VersionMismatchError,
)
from slmops.core.rollout.machine import Phase
from slmops.server.adapters.database import SqlStore
from slmops.server.adapters.database.schema import metadata
from slmops.server.adapters.folder import FolderLock, open_folder
from slmops.server.adapters.metadata_directory import MetadataDirectory
from slmops.server.api.content_routes import byte_range
from slmops.server.services.access import check_labels, read_device_key
from slmops.server.services.rollout_views import allowed_actions
from slmops.server.services.words import Caller, Role, role_named
from slmops.server.web.pages import safe_target
from slmops.server.web.rendering import number, ratio, size, tone


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-99", (0, 100)),
        ("bytes=10-19", (10, 20)),
        ("bytes=90-", (90, 100)),
        ("bytes=-10", (90, 100)),
        ("bytes=-500", (0, 100)),
        ("bytes=50-5000", (50, 100)),
        ("bytes=100-", None),
        ("bytes=20-10", None),
        ("bytes=-0", None),
        ("bytes=0-1,5-6", (0, 100)),  # several ranges: the whole, as the standard allows
        ("bytes=-", (0, 100)),
        ("lines=1-2", (0, 100)),
        ("bytes=a-b", (0, 100)),
    ],
)
def test_a_range_is_read_as_the_standard_says(header: str, expected: tuple[int, int] | None) -> None:
    """RFC 9110, section 14."""
    assert byte_range(header, 100) == expected


@given(st.text(max_size=30), st.integers(0, 10**12))
def test_no_range_header_leads_outside_the_blob(header: str, size_bytes: int) -> None:
    """Whatever it says."""
    found = byte_range("bytes=" + header, size_bytes)
    assert found is None or 0 <= found[0] <= found[1] <= size_bytes


@pytest.mark.parametrize("labels", [{"site": "hki"}, {"a/b.c": "x_1-y"}, {}])
def test_labels_that_selectors_can_name_are_taken(labels: dict[str, str]) -> None:
    """Letters, digits and a few signs."""
    check_labels(labels)


@pytest.mark.parametrize(
    "labels",
    [{"site": ""}, {"site": "a b"}, {"": "x"}, {"site": "x\n"}, {"a=b": "x"}, {"s": "x" * 64}, {"id": "pi"}],
)
def test_other_labels_are_refused(labels: dict[str, str]) -> None:
    """A selector could not be written for them, or they would lie about the device."""
    with pytest.raises(UsageError):
        check_labels(labels)


@pytest.mark.parametrize("pem", ["", "hello", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_a_device_key_must_be_a_p256_key(pem: str) -> None:
    """Anything else is refused before it is stored."""
    with pytest.raises(UsageError):
        read_device_key(pem)


def test_roles_include_the_lower_ones() -> None:
    """And the refusal names both."""
    Caller("a", Role.ADMIN).require(Role.VIEWER, "reading")
    with pytest.raises(PermissionDeniedError, match="needs the role approver, v has viewer"):
        Caller("v", role_named("viewer")).require(Role.APPROVER, "approving")
    with pytest.raises(UsageError, match="role 'root' is not known"):
        role_named("root")


def test_what_a_person_may_do_is_what_the_machine_allows() -> None:
    """By the machine's own table."""
    assert allowed_actions(Phase.AWAITING_APPROVAL) == ("approve", "reject", "abort")
    assert allowed_actions(Phase.OPEN) == ("pause", "abort", "rollback")
    assert allowed_actions(Phase.PAUSED) == ("resume", "abort", "rollback")
    assert allowed_actions(Phase.COMPLETED) == ("rollback",)
    assert allowed_actions(Phase.ROLLED_BACK) == ()


@pytest.mark.parametrize(
    "target", ["//evil.example", "/\\evil.example", "https://evil.example", "evil", "", "\\\\x"]
)
def test_signing_in_never_leads_to_another_site(target: str) -> None:
    """An open redirect would make our form a trap."""
    assert safe_target(target) == "/"


def test_signing_in_leads_back_to_the_page() -> None:
    """On this server."""
    assert safe_target("/rollouts/r-1") == "/rollouts/r-1"


def test_figures_are_written_for_people() -> None:
    """A dash where nothing was measured."""
    assert [size(v) for v in (None, 0, 999, 98_400_000, 1_234_567_890)] == [
        "–",
        "0 B",
        "999 B",
        "98.4 MB",
        "1.2 GB",
    ]
    assert [ratio(None), ratio(0.643)] == ["–", "64.3 %"]
    assert [number(None), number(1234), number(0.0123, 3)] == ["–", "1,234", "0.012"]
    assert [tone(s) for s in ("committed", "reverted", "paused", "probation", "waiting")] == [
        "good", "bad", "warn", "busy", "quiet",
    ]  # fmt: skip


def test_the_schema_is_the_sum_of_the_migrations(tmp_path: Path) -> None:
    """Nothing to migrate, on a new database and on one that was opened before."""
    for _ in range(2):
        store = SqlStore.in_folder(tmp_path)
        with store.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, metadata) == []
        store.close()


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    """And left as it is."""
    store = SqlStore.in_folder(tmp_path)
    with store.engine.connect() as connection:
        connection.execute(text("update alembic_version set version_num = 'v9999'"))
        connection.commit()
    store.close()
    with pytest.raises(VersionMismatchError, match="the database has schema v9999"):
        SqlStore.in_folder(tmp_path)


def test_a_folder_without_a_control_plane_is_left_as_it_is(tmp_path: Path) -> None:
    """A mistyped --data-dir (/tmp, say) keeps its mode, and gets no database."""
    tmp_path.chmod(0o1777)
    with pytest.raises(NotFoundError, match="nobody has made the keys"):
        open_folder(tmp_path)
    with pytest.raises(NotFoundError):
        open_folder(tmp_path / "not-there")
    assert tmp_path.stat().st_mode & 0o7777 == 0o1777
    assert list(tmp_path.iterdir()) == []


def test_a_data_folder_belongs_to_one_server(tmp_path: Path) -> None:
    """The second is told which process holds it; a released lock can be taken again."""
    (tmp_path / "data" / "keys").mkdir(parents=True)
    (tmp_path / "data" / "keys" / "online.pem").touch()
    folder = open_folder(tmp_path / "data")
    assert folder.stat().st_mode & 0o777 == 0o700
    lock = FolderLock(folder)
    with pytest.raises(BusyError, match="is in use by another control plane"):
        FolderLock(folder)
    lock.release()
    FolderLock(folder).release()


@pytest.mark.parametrize(
    "name", ["../1.root.json", "1.root.json\n", "0.root.json", "root.json", "timestamp.json/", ""]
)
def test_only_names_of_metadata_are_served(tmp_path: Path, name: str) -> None:
    """No path leads out of the folder."""
    (tmp_path / "1.root.json").write_bytes(b"outside")
    store = MetadataDirectory(tmp_path / "tuf")
    assert store.get(name) is None
    store.publish({"timestamp.json": b"t", "2.targets.json": b"2", "10.targets.json": b"10"})
    assert (store.latest_version("targets"), store.latest_version("snapshot")) == (10, 0)
    assert store.get("timestamp.json") == b"t"
