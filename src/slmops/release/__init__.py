"""From a build directory to a signed, published release. Needs the extra ``build`` only for what made the build.

Owns: the offline keys and their workspace, release manifests, the bundle directory, uploading a bundle. Does not own:
building and measuring (:mod:`slmops.build`), TUF arithmetic (:mod:`slmops.artifact.trust`), HTTP (:mod:`slmops.client`).

For the command line::

    from slmops.release import Workspace, init_keys, list_keys, create_release, list_releases, open_bundle, publish, verify_bundle

    workspace = Workspace.default()          # $XDG_CONFIG_HOME/slmops/keys (~/.config/slmops/keys); Workspace(path) elsewhere
    passphrase = read_passphrase(prompt)     # $SLMOPS_PASSPHRASE, else prompt("Passphrase"): never from argv
    report = init_keys(workspace, server_data_dir, passphrase, now)        # -> KeysReport; never overwrites a key
    list_keys(workspace)                     # -> tuple[KeyEntry, ...]: role, keyid, place, offline

    bundle = create_release(
        build_dir, version="1.0.0", workspace=workspace, passphrase=passphrase,
        waivers={"task.exact_match": "drill: ..."},      # metric, or profile:metric -> reason; signed and shown
        out_dir=Path("releases/home-intents-1.0.0"), created=datetime.now(timezone.utc),
    )                                        # -> ReleaseBundle; GateError (exit 5) when a gate failed and is not waived
    list_releases(workspace)                 # -> tuple[ReleaseEntry, ...]: model, version, release_seq, sha256
    bundle = open_bundle(Path("releases/home-intents-1.0.0"))
    verify_bundle(bundle, workspace)         # re-hashes every byte, checks the signatures -> BundleReport
    publish(bundle, control_plane, progress)     # -> PublishReport: blobs sent, bytes sent, already there; safe to repeat

``control_plane`` is :class:`slmops.client.ControlPlane` or anything with ``missing_blobs``, ``put_blob`` and
``publish_release`` (:class:`slmops.release.publish.Receiver`).
"""

from slmops.release.bundle import BundleReport, ReleaseBundle, open_bundle, verify_bundle
from slmops.release.create import create_release
from slmops.release.keys import (
    KeyEntry,
    KeysReport,
    ReleaseEntry,
    Workspace,
    init_keys,
    list_keys,
    list_releases,
    read_passphrase,
)
from slmops.release.publish import PublishEvent, PublishReport, publish

__all__ = [
    "BundleReport",
    "KeyEntry",
    "KeysReport",
    "PublishEvent",
    "PublishReport",
    "ReleaseBundle",
    "ReleaseEntry",
    "Workspace",
    "create_release",
    "init_keys",
    "list_keys",
    "list_releases",
    "open_bundle",
    "publish",
    "read_passphrase",
    "verify_bundle",
]
