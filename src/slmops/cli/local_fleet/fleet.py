"""A control plane and its devices on this machine: keys, server, agents, releases and rollouts, as users run them."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from slmops.cli.local_fleet import containers
from slmops.cli.local_fleet.processes import Processes, slmops_command, start_on_port, wait_for_run_file
from slmops.cli.rollout.printing import progress_line
from slmops.cli.server.run import READY
from slmops.client import ControlPlane
from slmops.client.records import BlueprintApplied, RolloutDetail
from slmops.core.device.profile import BUILTIN_PROFILES
from slmops.core.errors import BugError, DeadlineError, NotFoundError
from slmops.core.rollout.machine import ENDED
from slmops.release import ReleaseBundle, Workspace, create_release, init_keys, open_bundle, publish
from slmops.release.publish import PublishReport

_ENDED = frozenset(phase.value for phase in ENDED)


@dataclass(frozen=True, slots=True)
class LocalDevice:
    """One agent on this machine.

    Attributes:
        name: wished name, also of its folder.
        profile: device profile; its memory limit is enforced where the machine allows it.
        labels: for selectors.
        cpu_cores: share of CPU time of its engines; None for no limit.
        server_url: where it finds the control plane; empty for the direct way.
        options: further arguments of ``agent enroll``.
        image: container image that its agent runs in; empty for a process.
    """

    name: str
    profile: str
    labels: Mapping[str, str]
    cpu_cores: float | None = 1.0
    server_url: str = ""
    options: Sequence[str] = ()
    image: str = ""

    @property
    def ram_bytes(self) -> int:
        """Memory of its class.

        Raises:
            NotFoundError: the profile is none of the built-in ones.
        """
        known = BUILTIN_PROFILES.get(self.profile)
        if known is None:
            raise NotFoundError(
                f"profile {self.profile!r} is none of the built-in ones: a container needs its memory limit",
                hint=f"one of {', '.join(BUILTIN_PROFILES)}, or run it without a container",
            )
        return known.ram_bytes


class LocalFleet:
    """One control plane and its devices below ``root``; a folder that was used before is taken over as it is."""

    def __init__(self, root: Path) -> None:
        """Lay out the folder; nothing is started."""
        root.mkdir(parents=True, exist_ok=True)
        self.root = root.resolve()  # a container engine takes a relative path for the name of a volume
        self.processes = Processes(self.root / "logs")
        self.urls: dict[str, str] = {}
        self.server_url = ""
        self._containers: set[str] = set()
        self._passphrase = secrets.token_urlsafe(24)
        self._workspace = Workspace(self.root / "keys")
        self._data = self.root / "server"
        self._plane: ControlPlane | None = None

    @property
    def token_file(self) -> Path:
        """Where the operator's token is, readable by the owner only."""
        return self.root / "operator-token"

    @property
    def plane(self) -> ControlPlane:
        """The connection to the control plane."""
        if self._plane is None:
            raise BugError("the control plane is not started")
        return self._plane

    def folder(self, device: str) -> Path:
        """A device's folder."""
        return self.root / "devices" / device

    # ---- releases ----------------------------------------------------------------------------------------------------

    def make_keys(self) -> None:
        """Make root and release keys, protected by a passphrase that nobody keeps, and the server's own."""
        init_keys(self._workspace, self._data, self._passphrase, _now())

    def release(self, build: Path, version: str, waivers: Mapping[str, str]) -> ReleaseBundle:
        """Sign a build."""
        return create_release(
            build,
            version=version,
            workspace=self._workspace,
            passphrase=self._passphrase,
            waivers=waivers,
            out_dir=self.root / "releases" / version,
            created=_now(),
        )

    def publish(self, bundle: Path) -> PublishReport:
        """Send a release to the control plane."""
        return publish(open_bundle(bundle), self.plane, lambda event: None)

    # ---- processes ---------------------------------------------------------------------------------------------------

    def start_server(self, preferred_port: int, admin: str) -> None:
        """Start the control plane and sign in.

        Args:
            preferred_port: taken when it is free; 0 takes any.
            admin: name of the operator that is made.
        """
        arguments = ("server", "run", "--data-dir", str(self._data), "--poll-s", "1", "--tick-s", "0.5")
        self.server_url = start_on_port(self.processes, "server", arguments, READY, preferred=preferred_port)
        command = (
            "server",
            "token",
            "create",
            "--data-dir",
            str(self._data),
            "--role",
            "admin",
            "--name",
            admin,
        )
        made = subprocess.run(slmops_command(*command), check=True, capture_output=True, text=True)
        token = made.stdout.strip()
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(token + "\n", encoding="ascii")
        self._plane = ControlPlane(self.server_url, token)

    def start_devices(self, devices: Sequence[LocalDevice]) -> None:
        """Enrol devices with one-time tokens, start their agents, and wait until their gateways listen."""
        for device in devices:
            token = self.plane.create_device_token(ttl_s=600, uses=1).token
            labels = [
                word for name, value in device.labels.items() for word in ("--label", f"{name}={value}")
            ]
            # a container has its share of the CPU from outside
            cores = (
                [] if device.cpu_cores is None or device.image else ["--cpu-cores", f"{device.cpu_cores:g}"]
            )
            command = self._command(
                device,
                "agent",
                "enroll",
                device.server_url or self.server_url,
                "--profile",
                device.profile,
                "--name",
                device.name,
                "--listen",
                "127.0.0.1:0",
                *cores,
                *labels,
                *device.options,
            )
            environment = {**os.environ, "SLMOPS_ENROLL_TOKEN": token}
            self.processes.run(device.name, command, environment)
            self.processes.start_command(device.name, self._command(device, "agent", "run"), environment)
        for device in devices:
            self.urls[device.name] = wait_for_run_file(self.folder(device.name), self.processes)

    def _command(self, device: LocalDevice, *arguments: str) -> list[str]:
        """The command line of ``slmops ARGUMENTS`` on a device, in its folder."""
        folder = self.folder(device.name)
        if not device.image:
            return slmops_command(*arguments, "--dir", str(folder))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"slmops-{self.root.name}-{device.name}"
        self._containers.add(name)
        return containers.run_command(
            name,
            folder,
            device.image,
            [*arguments, "--dir", containers.FOLDER],
            ram_bytes=device.ram_bytes,
            cpu_cores=device.cpu_cores,
        )

    def stop(self, device: str) -> None:
        """Stop one device's agent; safe when it does not run."""
        self.processes.stop(device)

    # ---- rollouts ----------------------------------------------------------------------------------------------------

    def apply(self, blueprint: str) -> BlueprintApplied:
        """Apply a blueprint, given as YAML."""
        return self.plane.apply_blueprint(blueprint, "blueprint.yaml")

    def follow(self, rollout_id: str, timeout_s: float, say: Callable[[str], None]) -> RolloutDetail:
        """Wait until a rollout has ended; ``say`` is told every change.

        Raises:
            BusyError: a process of the fleet ended meanwhile.
            DeadlineError: the rollout did not end in time.
        """
        deadline = time.monotonic() + timeout_s
        seen = ""
        while time.monotonic() < deadline:
            self.processes.check()
            found = self.plane.rollout(rollout_id)
            line = progress_line(found)
            if line != seen:
                say(line)
                seen = line
            if found.phase in _ENDED:
                return found
            time.sleep(0.5)
        raise DeadlineError(
            f"rollout {rollout_id} did not end within {timeout_s:.0f} s: {seen}",
            hint=f"see the logs in {self.processes.logs}",
        )

    def close(self) -> None:
        """Stop whatever runs."""
        if self._plane is not None:
            self._plane.close()
            self._plane = None
        self.processes.stop_all()
        for name in self._containers:
            containers.remove(name)
        self._containers.clear()


def _now() -> datetime:
    return datetime.now(timezone.utc)
