"""A control plane without a socket, with its own time: devices check in through the real HTTP surface, ticks are calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops.artifact.trust import add_release
from slmops.client.records import RolloutDetail
from slmops.server.main import Application, ServerOptions, open_application
from slmops.server.services.words import Caller, Role
from tests.support.control_plane import (
    FACTS,
    FakeClock,
    Fate,
    Keys,
    MadeRelease,
    SeededNames,
    SimDevice,
    VariantSpec,
    always_good,
    in_process,
    make_release,
)

OPERATOR = Caller("olga", Role.ADMIN)
APPROVER = Caller("arne", Role.APPROVER)


@dataclass
class World:
    """One control plane, its fleet, and time."""

    application: Application
    clock: FakeClock
    keys: Keys
    send: Any
    devices: list[SimDevice] = field(default_factory=list)

    @property
    def services(self) -> Any:
        """The services."""
        return self.application.services

    def publish(
        self, version: str, seq: int, variants: Sequence[VariantSpec] = (VariantSpec("pi5-8gb"),), **what: Any
    ) -> MadeRelease:
        """Make, sign and publish a release."""
        made = make_release(version, seq, variants=variants, **what)
        services = self.services
        for digest in services.chunks.missing(list(made.blobs)):
            with services.chunks.upload(digest) as upload:
                upload.write(made.blobs[digest])
                upload.commit()
        path = made.release.target_path()
        signers = [self.keys.release]
        targets = add_release(
            services.publication.targets(), path, made.manifest, seq, signers, self.clock.now()
        )
        services.catalogue.publish(OPERATOR, path, targets.decode(), made.manifest.decode())
        return made

    def enroll(
        self, count: int, prefix: str = "pi", fate: Fate = always_good, **enrolment: Any
    ) -> list[SimDevice]:
        """New devices that have checked in once."""
        token = self.services.access.create_enrolment_token(OPERATOR, 3600, count, {}).token
        new = []
        for index in range(count):
            device = SimDevice(self.send, f"{prefix}-{index}", fate)
            device.now = self.clock.now
            device.enroll(token, **{"facts": FACTS, **enrolment})
            device.checkin()
            new.append(device)
        self.devices += new
        return new

    def apply(self, source: str) -> str:
        """Apply a blueprint; the rollout's id."""
        return str(self.services.blueprints.apply(OPERATOR, source, "blueprint.yaml").rollout_id)

    def act(self, rollout_id: str, action: str, caller: Caller = OPERATOR) -> None:
        """What a person orders."""
        self.services.rollouts.act_on(caller, rollout_id, action, "test")

    def round(self, seconds: float = 10, devices: Sequence[SimDevice] | None = None) -> None:
        """Time passes, every device checks in, the worker takes a turn."""
        now = self.clock.advance(seconds)
        for device in self.devices if devices is None else devices:
            device.checkin()
        self.services.rollouts.tick(now)

    def rounds(self, count: int, seconds: float = 10) -> None:
        """Several of them."""
        for _ in range(count):
            self.round(seconds)

    def rollout(self, rollout_id: str) -> RolloutDetail:
        """How a rollout stands."""
        detail: RolloutDetail = self.services.rollout_views.detail(rollout_id)
        return detail

    def until_ended(self, rollout_id: str, seconds: float = 10, rounds: int = 80) -> RolloutDetail:
        """Rounds until the rollout has ended."""
        for _ in range(rounds):
            self.round(seconds)
            detail = self.rollout(rollout_id)
            if detail.ended_at:
                return detail
        raise AssertionError(f"rollout did not end: {self.rollout(rollout_id)}")


@contextmanager
def world(
    data_dir: Path, *, keys: Keys | None = None, clock: FakeClock | None = None, seed: int = 7, **options: Any
) -> Iterator[World]:
    """A world on a data folder (made ready when it is new); the database is in memory unless said otherwise."""
    keys = keys or Keys()
    if not (data_dir / "keys").exists():
        keys.prepare(data_dir)
    clock = clock or FakeClock()
    wanted = {"database_url": "sqlite://", "reserve_bytes": 0, "linger_s": 0.0, **options}
    with open_application(
        ServerOptions(data_dir=data_dir, **wanted), clock=clock, names=SeededNames(seed)
    ) as application:
        send = in_process(application)
        try:
            yield World(application, clock, keys, send)
        finally:
            send.close()
