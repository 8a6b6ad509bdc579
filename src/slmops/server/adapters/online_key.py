"""The control plane's online key, which signs snapshot and timestamp."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner, Signer

from slmops.core.errors import NotFoundError, UsageError


def load_online_key(path: Path) -> Signer:
    """Read the key.

    Raises:
        NotFoundError: nobody has made it yet.
        UsageError: it is not a P-256 private key in PEM.
    """
    try:
        pem = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{path} is missing: nobody has made the keys of this control plane yet",
            hint=f"run: slmops keys init --server-data {path.parent.parent}",
        ) from error
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", hint="check its owner and mode (0600)"
        ) from error
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"{path} is not a private key: {error}", hint="run slmops keys init again"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError(f"{path} is not a P-256 key", hint="run slmops keys init again")
    return CryptoSigner(key)
