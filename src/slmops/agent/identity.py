"""Who this device is: its settings file and its key, made at enrolment."""

from __future__ import annotations

import platform
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from slmops.agent.store.files import write_atomic
from slmops.agent.store.layout import Layout
from slmops.artifact.digest import UNREADABLE_JSON
from slmops.core.errors import ConflictError, NotFoundError, UsageError

SCHEMA = 1


class DeviceConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """``device.json``: written at enrolment, may be edited by hand while the agent is stopped.

    Attributes:
        device_id: given by the control plane; ``server_url``: where that is.
        profile: the device profile.
        tuf_root: pinned root metadata (JSON text).
        poll_s: how often to check in.
        gateway_host, gateway_port: where applications find the model; port 0 picks a free one.
        ram_limit_bytes: memory that slmops may use; None takes what the machine has.
        cpu_cores: CPU share for engines; None for no limit. ``threads``: compute threads of one engine.
        runtimes: engines that this device may use; none means every installed one.
        extra_runtime: one more engine that this device may start (``module:attribute``); for tests and own engines.
    """

    schema: int
    device_id: str
    server_url: str
    profile: str
    tuf_root: str
    poll_s: float = 30.0
    labels: dict[str, str] = {}
    gateway_host: str = "127.0.0.1"
    gateway_port: int = 8421
    ram_limit_bytes: int | None = None
    cpu_cores: float | None = None
    threads: int = 1
    extra_runtime: str = ""
    runtimes: tuple[str, ...] = ()


def load_config(layout: Layout) -> DeviceConfig:
    """Read the device's settings.

    Raises:
        NotFoundError: the device is not enrolled.
        UsageError: the file was damaged by hand; names the place.
    """
    try:
        content = layout.config.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{layout.root} holds no enrolled device",
            hint="run: slmops agent enroll URL TOKEN --dir DIR --profile NAME",
        ) from error
    try:
        return msgspec.json.decode(content, type=DeviceConfig)
    except UNREADABLE_JSON as error:
        raise UsageError(
            f"{layout.config}: {error}", hint="mend the file, or enroll the device again in an empty folder"
        ) from error


def save_config(layout: Layout, config: DeviceConfig) -> None:
    """Write the device's settings."""
    write_atomic(layout.config, msgspec.json.format(msgspec.json.encode(config), indent=2), mode=0o600)


def make_key(layout: Layout) -> str:
    """Make the device's P-256 key pair; the private half never leaves the device.

    Returns:
        The public key, PEM.

    Raises:
        ConflictError: the folder already holds an enrolled device.
    """
    if layout.config.exists():
        raise ConflictError(
            f"{layout.root} already holds an enrolled device",
            hint="use an empty folder, or remove this one first",
        )
    if layout.key.exists():  # an enrolment that was cut off: go on with the same key
        return public_key_pem(layout.key)
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomic(layout.key, private, mode=0o600)
    return public_key_pem(layout.key)


def public_key_pem(path: Path) -> str:
    """Public half of a private key file, PEM."""
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def machine_arch() -> str:
    """This machine's architecture in the field's words."""
    arch = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(arch, arch)
