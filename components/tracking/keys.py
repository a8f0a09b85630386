"""The signing key of this machine or step, the keys that are trusted, and seals of what waits on a shared volume.

A statement or history entry is signed with an ECDSA P-256 key, the one kind that OpenSSF model signing, DSSE and every
cloud's key store have in common. The private key comes from KUBEALIGN_SIGNING_KEY (PEM text, or the path of a PEM
file); on a laptop it is made at first use in the home folder, for its owner's eyes. KUBEALIGN_PUBLIC_KEYS lists what
is trusted; without it, the machine's own key is.

What one step leaves in a cache for another carries a seal, an HMAC whose key other users of the volume do not have:
KUBEALIGN_CACHE_KEY, or derived from the signing key.
"""

import base64
import binascii
import hashlib
import hmac
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.common.errors import InputError
from components.tracking import store

SIGNING_KEY_VARIABLE = "KUBEALIGN_SIGNING_KEY"
PUBLIC_KEYS_VARIABLE = "KUBEALIGN_PUBLIC_KEYS"
"""Environment variable with the trusted keys: base64 of DER (SubjectPublicKeyInfo), separated by spaces or commas."""
CACHE_KEY_VARIABLE = "KUBEALIGN_CACHE_KEY"
KEY_FILE = "signing.key"
"""The laptop's private key, in the home folder."""
MIN_CACHE_KEY = 32
"""Characters of KUBEALIGN_CACHE_KEY."""


def signing_key() -> Any:
    """The private key to sign with.

    Raises:
        InputError: a step in a cluster has none, or it is not an ECDSA key on P-256.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    where = SIGNING_KEY_VARIABLE if os.environ.get(SIGNING_KEY_VARIABLE) else str(store.home() / KEY_FILE)
    try:
        key = load_pem_private_key(given_key() or _own_key(), password=None)
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"{where}: no readable private key (expected PEM without a password, or its path)") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise InputError(f"{where}: expected an ECDSA key on P-256, such as `kubealign keys --secret` makes")
    return key


def given_key() -> bytes:
    """The private key of KUBEALIGN_SIGNING_KEY as PEM, which may be a path; empty if it is not set."""
    given = os.environ.get(SIGNING_KEY_VARIABLE, "")
    return given.encode() if not given or "-----BEGIN" in given else Path(given).read_bytes()


def trusted_keys() -> dict[str, Any]:
    """The public keys whose signatures count, by key id.

    Raises:
        InputError: an entry of KUBEALIGN_PUBLIC_KEYS is no such key, or a step in a cluster has no list.
    """
    listed = os.environ.get(PUBLIC_KEYS_VARIABLE, "")
    keys = [read_public_key(text) for text in re.split(r"[\s,]+", listed) if text]
    if not keys:
        if in_cluster() and not os.environ.get(SIGNING_KEY_VARIABLE):
            raise InputError(f"{PUBLIC_KEYS_VARIABLE} is not set: this step cannot tell whose versions to trust")
        keys = [signing_key().public_key()]
    return {key_id(key): key for key in keys}


def read_public_key(text: str) -> Any:
    """A public key from its line in `register.public_keys`.

    Raises:
        InputError: it is none.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    try:
        key = load_der_public_key(base64.b64decode(text, validate=True))
    except (ValueError, binascii.Error) as error:
        raise InputError(f"public key {text[:20]}…: expected base64 of DER; `kubealign keys` prints one") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise InputError(f"public key {text[:20]}…: expected an ECDSA key on P-256; `kubealign keys` prints one")
    return key


def public_line(key: Any) -> str:
    """A public key as one line, for `register.public_keys`."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return base64.b64encode(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()


def public_pem(key: Any) -> bytes:
    """A public key as PEM, as other tools read it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem: bytes = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem


def key_id(public: Any) -> str:
    """sha256 of the key's PEM, which is also OpenSSF model signing's hint."""
    return hashlib.sha256(public_pem(public)).hexdigest()


def check_own_key() -> None:
    """Check, before hours of training, that what will be registered will be trusted.

    Raises:
        InputError: the signing key is not among the trusted ones.
    """
    own = key_id(signing_key().public_key())
    if own not in trusted_keys():
        where = SIGNING_KEY_VARIABLE if os.environ.get(SIGNING_KEY_VARIABLE) else str(store.home() / KEY_FILE)
        raise InputError(
            f"{where}: the signing key {own[:12]} is not among register.public_keys, so nothing it registers would be"
            f" trusted; add the line that `kubealign keys` prints, or give the right key in {SIGNING_KEY_VARIABLE}"
        )


def seal(what: str, data: bytes) -> str:
    """The proof that a step of ours left this data as what it is called, in hexadecimal."""
    return hmac.new(_cache_key(), b"%b\0%b" % (what.encode(), data), hashlib.sha256).hexdigest()


def is_sealed(what: str, data: bytes, proof: str) -> bool:
    """Whether the proof is that of this data."""
    return hmac.compare_digest(seal(what, data).encode(), proof.encode())


def in_cluster() -> bool:
    """Whether this is a step on Kubeflow, where keys come from secrets and none is made."""
    return bool(os.environ.get(store.KFP_RUN_VARIABLE))


def _cache_key() -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    given = os.environ.get(CACHE_KEY_VARIABLE, "")
    if given:
        if len(given) < MIN_CACHE_KEY:
            raise InputError(f"{CACHE_KEY_VARIABLE}: expected at least {MIN_CACHE_KEY} random characters")
        return given.encode()
    if in_cluster() and not os.environ.get(SIGNING_KEY_VARIABLE):
        raise InputError(
            f"{CACHE_KEY_VARIABLE} is not set: this step can neither prove its results nor trust those in a cache; set"
            " cluster.signing_secret to the secret that holds it"
        )
    number = signing_key().private_numbers().private_value
    return HKDF(SHA256(), 32, salt=None, info=b"kubealign cache").derive(number.to_bytes(32, "big"))


def _own_key() -> bytes:
    """The laptop's key, made at first use; of two makers at once, one wins and both use its key."""
    path = store.home() / KEY_FILE
    if path.exists():
        return path.read_bytes()
    if in_cluster():
        raise InputError(f"{SIGNING_KEY_VARIABLE} is not set; set cluster.signing_secret to the secret that holds it")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{KEY_FILE}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.flush()
            os.fsync(file.fileno())
        if os.geteuid() == 0:  # steps in containers run as the home folder's owner
            owner = path.parent.stat()
            os.chown(scratch, owner.st_uid, owner.st_gid)
        with suppress(FileExistsError):
            os.link(scratch, path)
    finally:
        Path(scratch).unlink()
    return path.read_bytes()
