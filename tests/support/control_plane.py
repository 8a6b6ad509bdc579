"""A real control plane for tests, releases to publish on it, and devices that follow the real device machine over HTTP."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import jwt
import msgspec
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from securesystemslib.signer import CryptoSigner

from slmops.artifact.chunkmap import Chunk, ChunkMap, encode_chunk_map
from slmops.artifact.digest import sha256_hex
from slmops.artifact.manifest import (
    SCHEMA,
    ArtifactEntry,
    Base,
    Blob,
    GoldenExpectations,
    GoldenMessage,
    GoldenPack,
    GoldenPrompt,
    Measured,
    NamedBlob,
    Release,
    RuntimeNeed,
    Variant,
    VariantEntry,
    Waiver,
    blob_of,
    encode,
)
from slmops.artifact.trust import add_release, new_root, new_targets
from slmops.client import ControlPlane
from slmops.client.problems import error_from
from slmops.client.records import ReleaseRecord
from slmops.core.device import machine
from slmops.core.device.machine import Command, DeviceState, Failure, Target
from slmops.protocol.messages import (
    DEVICE_AUDIENCE,
    Assignment,
    CheckinRequest,
    CheckinResponse,
    EnrollRequest,
    EnrollResponse,
    Facts,
    GoldenReport,
    OutcomeReport,
    decode,
)
from slmops.protocol.messages import SCHEMA as MESSAGES
from slmops.protocol.messages import encode as encode_message
from slmops.server.main import (
    Application,
    HttpServer,
    ServerOptions,
    create_operator_token,
    listen,
    open_application,
    url_of,
)

MiB = 1 << 20
# The server's log is not what these tests are about, and rendering traces for a terminal takes seconds.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


class FakeClock:
    """A clock that only moves when told to."""

    def __init__(self, start: datetime | None = None) -> None:
        """Start at the real time: signatures are checked against it."""
        self._now = start or datetime.now(timezone.utc)

    def now(self) -> datetime:
        """UTC."""
        return self._now

    def advance(self, seconds: float) -> datetime:
        """Move on."""
        self._now += timedelta(seconds=seconds)
        return self._now


class SeededNames:
    """Names and chance that repeat: the same test lays out the same waves."""

    def __init__(self, seed: int = 7) -> None:
        """Begin at number one."""
        self._chance = random.Random(seed)
        self._number = 0

    def rollout_id(self) -> str:
        """``r-1``, ``r-2`` ..."""
        self._number += 1
        return f"r-{self._number}"

    def secret(self) -> str:
        """Unlike all others."""
        return self._chance.randbytes(32).hex()

    def jitter(self) -> float:
        """Uniform in 0..1."""
        return self._chance.random()


# ---- keys and releases --------------------------------------------------------------------------------------------


@dataclass
class Keys:
    """The offline keys of a test's publisher, and a data folder that trusts them."""

    root: CryptoSigner = field(default_factory=CryptoSigner.generate_ecdsa)
    release: CryptoSigner = field(default_factory=CryptoSigner.generate_ecdsa)

    def prepare(self, data_dir: Path) -> None:
        """What ``slmops keys init`` writes into a server's data folder."""
        private = ec.generate_private_key(ec.SECP256R1())
        online = CryptoSigner(private)
        now = datetime.now(timezone.utc)
        (data_dir / "keys").mkdir(parents=True)
        (data_dir / "tuf").mkdir()
        pem = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (data_dir / "keys" / "online.pem").write_bytes(pem)
        (data_dir / "keys" / "online.pem").chmod(0o600)
        root = new_root([self.root], [self.release.public_key], [online.public_key], now)
        (data_dir / "tuf" / "1.root.json").write_bytes(root)
        (data_dir / "tuf" / "1.targets.json").write_bytes(new_targets([self.release], now))


@dataclass(frozen=True)
class VariantSpec:
    """One variant to make; ``kld`` is its loss, ``weights_bytes`` decides where it fits."""

    profile: str
    kld: float = 0.01
    weights_bytes: int = 60 * MiB
    also_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class MadeRelease:
    """A release on this side: its documents by digest, and the manifest."""

    release: Release
    manifest: bytes
    blobs: dict[str, bytes]
    variants: dict[str, str]  # profile -> digest of the variant manifest

    @property
    def digest(self) -> str:
        """The release's identity."""
        return sha256_hex(self.manifest)


def make_release(
    version: str,
    seq: int,
    *,
    model: str = "home-intents",
    variants: Iterable[VariantSpec] = (VariantSpec("pi5-8gb"),),
    prompts: dict[str, str] | None = None,
    waivers: tuple[Waiver, ...] = (),
    evidence: bytes = b'{"gates":[]}',
    seed: int = 0,
) -> MadeRelease:
    """A small but complete release: real manifests, chunk maps and chunks."""
    rng = random.Random(f"{model}/{version}/{seed}")
    blobs: dict[str, bytes] = {}

    def keep(content: bytes) -> Blob:
        blobs[sha256_hex(content)] = content
        return blob_of(content)

    pack = keep(encode(GoldenPack(SCHEMA, (GoldenPrompt("g1", (GoldenMessage("user", "hi"),), "hello"),))))
    entries = []
    digests = {}
    for spec in variants:
        pieces = [rng.randbytes(rng.randint(2_000, 5_000)) for _ in range(3)]
        whole = b"".join(pieces)
        for piece in pieces:
            keep(piece)
        chunk_map = ChunkMap(
            1, "raw", len(whole), sha256_hex(whole), tuple(Chunk(len(p), sha256_hex(p)) for p in pieces)
        )
        golden = keep(encode(GoldenExpectations(SCHEMA, pack.sha256, sha256_hex(b"ref"), ())))
        shape = {
            "weights_bytes": spec.weights_bytes,
            "parameters": 134_000_000,
            "layers": 30,
            "k_width": 192,
            "v_width": 192,
            "hidden": 576,
            "ffn": 1536,
            "vocabulary": 49_152,
            "context_max_tokens": 8192,
        }
        map_blob = keep(encode_chunk_map(chunk_map))
        variant = Variant(
            schema=SCHEMA,
            model=model,
            profile=spec.profile,
            runtime=RuntimeNeed("llama.cpp", "11549"),
            artifacts=(ArtifactEntry("model", "model.gguf", "raw", len(whole), sha256_hex(whole), map_blob),),
            shape=shape,
            golden=golden,
            measured=Measured(4.6, spec.kld, 0.93, 31.0, 42.0, 210.0, 0.5, 190 * MiB, exact_match_ratio=0.62),
            quantised={"Q4_0": 210, "F32": 61},
            also_for=spec.also_for,
        )
        blob = keep(encode(variant))
        digests[spec.profile] = blob.sha256
        entries.append(VariantEntry(spec.profile, "llama.cpp", blob.bytes, blob.sha256, len(whole)))
    release = Release(
        schema=SCHEMA,
        model=model,
        version=version,
        release_seq=seq,
        created="2026-11-08T10:00:00Z",
        base=Base("SmolLM2-135M-Instruct", sha256_hex(b"base"), "Apache-2.0"),
        licence="Apache-2.0",
        variants=tuple(entries),
        golden_pack=pack,
        evidence=keep(evidence),
        provenance=keep(b'{"steps":[]}'),
        prompts=tuple(
            NamedBlob(name, len(text.encode()), keep(text.encode()).sha256)
            for name, text in (prompts or {}).items()
        ),
        waivers=waivers,
    )
    return MadeRelease(release, encode(release), blobs, digests)


def publish(api: ControlPlane, keys: Keys, made: MadeRelease) -> ReleaseRecord:
    """Upload what is missing, sign, publish: what ``slmops release create`` does."""
    for digest in api.missing_blobs(list(made.blobs)):
        api.put_blob(digest, made.blobs[digest])
    path = made.release.target_path()
    now = datetime.now(timezone.utc)
    targets = add_release(
        api.published_targets(), path, made.manifest, made.release.release_seq, [keys.release], now
    )
    return api.publish_release(path, targets, made.manifest)


# ---- the server ---------------------------------------------------------------------------------------------------


@dataclass
class Plane:
    """A running control plane with a client for each role."""

    application: Application
    options: ServerOptions
    url: str
    token: str
    keys: Keys

    def api(self) -> ControlPlane:
        """A client with the admin's token; close it."""
        return ControlPlane(self.url, self.token)


@contextmanager
def running_plane(
    data_dir: Path, *, keys: Keys | None = None, work: bool = True, **options: Any
) -> Iterator[Plane]:
    """A control plane on a loopback port of its own, in threads of this process.

    Args:
        data_dir: made ready when it is new.
        keys: the publisher's; new ones by default.
        work: whether the worker ticks by itself.
        **options: of ServerOptions, and ``clock``.
    """
    keys = keys or Keys()
    if not (data_dir / "keys").exists():
        keys.prepare(data_dir)
    clock = options.pop("clock", None)
    wanted = ServerOptions(
        data_dir=data_dir,
        port=0,
        **{"tick_s": 0.02, "poll_s": 30.0, "reserve_bytes": 0, "linger_s": 0.0, **options},
    )
    listener = listen("127.0.0.1", 0)
    with listener, open_application(wanted, clock=clock) as application:
        server = HttpServer(application, wanted)
        started = threading.Event()
        server.on_started = started.set
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        if work:
            application.worker.start()
        assert started.wait(30), "the server did not start"
        name = f"admin-{random.SystemRandom().randrange(1 << 30)}"
        token = create_operator_token(wanted, "admin", name, None)
        try:
            yield Plane(application, wanted, url_of(listener, tls=False), token, keys)
        finally:
            server.should_exit = True
            thread.join(30)


# ---- devices ------------------------------------------------------------------------------------------------------

FACTS = Facts(
    arch="aarch64",
    cores=4,
    ram_limit_bytes=2048 * MiB,
    disk_free_bytes=4096 * MiB,
    runtimes={"llama.cpp": "11549"},
    agent_version="0.1.0",
)

#: what a device does with a release, by version; None lets it commit
Fate = Callable[["SimDevice", Assignment], Failure | str | None]


def always_good(device: SimDevice, assignment: Assignment) -> Failure | str | None:
    """Every release is fine."""
    return None


class SimDevice:
    """A device that follows the real device machine; its work takes no time and ends as its ``fate`` says.

    The fate's answer: None commits; a Failure fails in probation; "silent" takes the offer and is never heard again;
    "refuse" does not fit; "stuck" stays in probation.
    """

    def __init__(
        self, send: Callable[[str, bytes, str], tuple[int, bytes, str]], name: str, fate: Fate = always_good
    ) -> None:
        """``send`` posts a body to a path with an Authorization header: (status, body, content type)."""
        self.send = send
        self.name = name
        self.fate = fate
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.state = DeviceState()
        self.orders: dict[str, Assignment] = {}
        self.generations: list[tuple[int, str]] = []
        self.golden: GoldenReport | None = None
        self.acknowledged = True
        self.seq = 0
        self.boot_id = f"boot-{name}"
        self.silent = False
        self.now: Callable[[], datetime] = lambda: datetime.now(timezone.utc)
        self.requests = 0
        self.tuf_root = ""

    # ---- talking ----

    def enroll(
        self, token: str, profile: str = "pi5-8gb", facts: Facts = FACTS, labels: dict[str, str] | None = None
    ) -> None:
        """Exchange a token for an identity."""
        pem = self.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        request = EnrollRequest(MESSAGES, token, pem.decode(), self.name, profile, facts, labels or {})
        response = decode(self._post("/v1/enroll", encode_message(request), ""), EnrollResponse)
        self.name, self.tuf_root = response.device_id, response.tuf_root

    def bearer(self) -> str:
        """A fresh token."""
        now = int(self.now().timestamp())
        claims = {"iss": self.name, "aud": DEVICE_AUDIENCE, "iat": now, "exp": now + 120}
        return "Bearer " + jwt.encode(claims, self.key, algorithm="ES256")

    def report(self) -> CheckinRequest:
        """Where it stands; takes the next sequence number."""
        self.seq += 1
        state = self.state
        running = state.candidate if state.phase is machine.Phase.PROBATION else state.committed
        outcome = state.outcome
        sent = None
        if outcome is not None and not self.acknowledged:
            failure = outcome.failure
            sent = OutcomeReport(
                outcome.assignment_digest,
                outcome.rollout_id,
                outcome.generation,
                outcome.status,
                cause=failure.cause if failure else "",
                code=failure.code if failure else "",
                detail=failure.detail if failure else "",
                golden=self.golden,
            )
        return CheckinRequest(
            schema=MESSAGES,
            boot_id=self.boot_id,
            seq=self.seq,
            generation=state.generation,
            phase=state.phase.value,
            running=running.assignment_digest if running else "",
            running_release=running.release_digest if running else "",
            candidate=state.candidate.assignment_digest if state.candidate else "",
            requests=self.requests,
            outcome=sent,
        )

    def checkin(self) -> CheckinResponse | None:
        """One round: report, take the order, do the work."""
        if self.silent:
            return None
        request = self.report()
        body = self._post("/v1/checkin", encode_message(request), self.bearer())
        if request.outcome is not None:
            self.acknowledged = True
        response = decode(body, CheckinResponse) if body else None
        if response is not None and response.assignment is not None:
            self.take(response.assignment)
        return response

    def _post(self, path: str, body: bytes, bearer: str) -> bytes:
        status, content, kind = self.send(path, body, bearer)
        if status >= 400:
            raise error_from(status, content, kind, path)
        return content

    # ---- working ----

    def take(self, order: Assignment) -> None:
        """Follow an order."""
        self.generations.append((order.generation, order.action))
        if order.action == "withdraw":
            self.feed(machine.Withdrawn(order.assignment_digest, order.generation))
        elif order.action == "revert":
            self.feed(machine.RevertOrdered(order.assignment_digest, order.generation))
        else:
            self.orders[order.assignment_digest] = order
            target = Target(
                order.assignment_digest,
                order.release_sha256,
                order.release_seq,
                order.rollout_id,
                order.generation,
            )
            self.feed(machine.Offered(target))

    def feed(self, event: machine.Event) -> None:
        """Run the machine until it rests or waits."""
        self.state, commands = machine.step(self.state, event)
        for command in commands:
            self._do(command)

    def _do(self, command: Command) -> None:
        candidate = self.state.candidate
        if command is Command.REPORT:
            self.acknowledged = False
            return
        if command is Command.REVERT:
            self.feed(machine.Restored())
            return
        if candidate is None or candidate.assignment_digest not in self.orders:
            return
        fate = self.fate(self, self.orders[candidate.assignment_digest])
        if command is Command.CHECK_ADMISSION:
            if fate == "silent":
                self.silent = True
            elif fate == "refuse":
                self.feed(machine.Refused(("memory: needs more than there is",)))
            else:
                self.feed(machine.Admitted())
        elif command is Command.FETCH:
            self.feed(machine.Fetched())
        elif command is Command.VERIFY:
            self.feed(machine.Verified())
        elif command is Command.AWAIT_WINDOW:
            self.feed(machine.WindowOpened())
        elif command is Command.ACTIVATE:
            self.feed(machine.Activated())
        elif command is Command.RUN_PROBATION and fate != "stuck":
            if isinstance(fate, Failure):
                lost = (
                    GoldenReport(1, 0, only_old=1, lost=("g1",))
                    if self.state.committed
                    else GoldenReport(0, 1)
                )
                self.golden = lost if fate.cause == "content" else None
                self.feed(machine.Failed(fate))
            else:
                self.golden = GoldenReport(1, 0, both=1) if self.state.committed else GoldenReport(1, 0)
                self.feed(machine.Proved())


def over_http(client: httpx.Client) -> Callable[[str, bytes, str], tuple[int, bytes, str]]:
    """Real requests."""

    def send(path: str, body: bytes, bearer: str) -> tuple[int, bytes, str]:
        headers = {"Authorization": bearer} if bearer else {}
        response = client.post(path, content=body, headers=headers)
        return response.status_code, response.content, response.headers.get("content-type", "")

    return send


def in_process(application: Application) -> Callable[[str, bytes, str], tuple[int, bytes, str]]:
    """The same HTTP surface without a socket, for simulations with their own time."""
    loop = asyncio.new_event_loop()
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=application.asgi), base_url="http://plane")

    def send(path: str, body: bytes, bearer: str) -> tuple[int, bytes, str]:
        headers = {"Authorization": bearer} if bearer else {}
        response = loop.run_until_complete(client.post(path, content=body, headers=headers))
        return response.status_code, response.content, response.headers.get("content-type", "")

    send.close = lambda: (loop.run_until_complete(client.aclose()), loop.close())  # type: ignore[attr-defined]
    return send


def enrolled(
    api: ControlPlane,
    client: httpx.Client,
    names: Iterable[str],
    *,
    fate: Fate = always_good,
    now: Callable[[], datetime] | None = None,
    **enrolment: Any,
) -> list[SimDevice]:
    """Devices that have enrolled and checked in once; ``now`` is their clock, where a test moves time."""
    wanted = list(names)
    token = api.create_device_token(uses=len(wanted)).token
    devices = [SimDevice(over_http(client), name, fate) for name in wanted]
    for device in devices:
        device.now = now or device.now
        device.enroll(token, **enrolment)
        device.checkin()
    return devices


def blueprint(
    name: str = "home",
    *,
    selector: str = "",
    model: str = "home-intents",
    version: str | None = None,
    channel: str = "stable",
    waves: str = "[{limit: 1, max_failures: 0}, {limit: 100%, dynamic: true}]",
    extra: str = "",
    approvals: int = 0,
    on_abort: str = "revert_all",
    deadlines: str = "{acknowledge_s: 3600, update_s: 600}",
    priority: int = 0,
    overlays: str = "",
) -> str:
    """A blueprint's text; promotes at once when a wave has passed."""
    reference = f"version: {version}" if version else f"channel: {channel}"
    return f"""\
apiVersion: slmops/v1
kind: Blueprint
metadata: {{name: {name}}}
selector: "{selector}"
model: {{name: {model}, {reference}}}
serving: {{context_tokens: 1024}}
rollout:
  waves: {waves}
  bake: {{min_s: 0, max_s: 3600}}
  deadlines: {deadlines}
  probation_min_s: 0
  approvals: {approvals}
  on_abort: {on_abort}
{extra}{f"priority: {priority}" + chr(10) if priority else ""}{f"overlays: {overlays}" + chr(10) if overlays else ""}"""


def lie_about_memory(facts: Facts, ram_limit_bytes: int) -> Facts:
    """The same device with another memory limit."""
    return msgspec.structs.replace(facts, ram_limit_bytes=ram_limit_bytes)
