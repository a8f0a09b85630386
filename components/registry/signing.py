"""Signed documents: in-toto statements in DSSE envelopes, and signatures of the OpenSSF model-signing format.

Formats: https://github.com/secure-systems-lab/dsse (protocol.md, envelope.md), https://in-toto.io/Statement/v1,
https://github.com/sigstore/model-transparency. The libraries of the same names are the tests' oracles; here, where
documents must stay readable for years, `cryptography` alone is used. Every file has exactly one valid form: whatever
decodes to the same content but has other bytes is refused.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from components.common.errors import EvidenceError
from components.tracking.keys import key_id, trusted_keys

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
MODEL_SIGNING = "https://model_signing/signature/v1.0"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"


def canonical(value: Any) -> bytes:
    """A JSON value as the only bytes that we sign or accept for it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def statement(subject: Mapping[str, str], kind: str, predicate: Any) -> dict[str, Any]:
    """An in-toto statement: the predicate, of a type, about files by their sha256."""
    named = [{"name": name, "digest": {"sha256": value}} for name, value in sorted(subject.items())]
    return {"_type": STATEMENT_TYPE, "subject": named, "predicateType": kind, "predicate": predicate}


def signed(document: dict[str, Any], key: Any) -> bytes:
    """The document in a DSSE envelope."""
    payload = canonical(document)
    return _envelope(payload, key_id(key.public_key()), sign(payload, PAYLOAD_TYPE, key))


def opened(text: bytes, where: str) -> dict[str, Any]:
    """The document in an envelope, if one of the trusted keys signed it.

    Raises:
        EvidenceError: damaged, or signed by nobody we trust.
    """
    try:
        envelope = json.loads(text)
        (signature,) = envelope["signatures"]
        payload, proof = (base64.b64decode(part, validate=True) for part in (envelope["payload"], signature["sig"]))
        signer = str(signature["keyid"])
        intact = _envelope(payload, signer, proof) == text
    except (ValueError, TypeError, KeyError, AttributeError, binascii.Error) as error:
        raise EvidenceError(f"{where}: not a signed statement, expected a DSSE envelope; it proves nothing") from error
    if not intact:
        raise EvidenceError(f"{where}: not in the form in which it was signed; it was changed since")
    check_signature(payload, PAYLOAD_TYPE, proof, signer, where)
    document: dict[str, Any] = json.loads(payload)
    return document


def sign(payload: bytes, kind: str, key: Any) -> bytes:
    """The signature of a payload of a type, by DSSE's pre-authentication encoding."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256

    proof: bytes = key.sign(_encoded(payload, kind), ec.ECDSA(SHA256()))
    return proof


def check_signature(payload: bytes, kind: str, proof: bytes, signer: str, where: str) -> None:
    """Check a signature against the trusted keys.

    Raises:
        EvidenceError: another key signed it, or nobody.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256

    trusted = trusted_keys()
    if signer not in trusted:
        raise EvidenceError(
            f"{where}: signed by key {signer[:12]}, which is not trusted here (trusted: "
            f"{', '.join(name[:12] for name in trusted)}); if it is yours, add it to register.public_keys"
        )
    try:
        trusted[signer].verify(proof, _encoded(payload, kind), ec.ECDSA(SHA256()))
    except InvalidSignature as error:
        raise EvidenceError(f"{where}: the signature is not that of key {signer[:12]}; it was changed since") from error


def model_signature(name: str, files: Mapping[str, str], left_out: list[str], key: Any) -> bytes:
    """model.sig: a model's files in the OpenSSF model-signing format, which `model_signing verify key` checks.

    Args:
        name: the model's name, for people.
        files: sha256 of each file by its path.
        left_out: files that are not signed.
        key: signs.
    """
    ordered = sorted(files.items(), key=lambda item: PurePosixPath(item[0]))
    root = hashlib.sha256(b"".join(bytes.fromhex(value) for _, value in ordered)).hexdigest()
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": left_out}
    resources = [{"name": path, "algorithm": "sha256", "digest": value} for path, value in ordered]
    predicate = {"serialization": serialization, "resources": resources}
    payload = canonical(statement({name: root}, MODEL_SIGNING, predicate))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"sig": base64.b64encode(sign(payload, PAYLOAD_TYPE, key)).decode(), "keyid": ""}],
    }
    material = {"publicKey": {"hint": key_id(key.public_key())}, "tlogEntries": []}
    return canonical({"mediaType": BUNDLE, "verificationMaterial": material, "dsseEnvelope": envelope})


def _envelope(payload: bytes, signer: str, proof: bytes) -> bytes:
    signature = {"keyid": signer, "sig": base64.b64encode(proof).decode()}
    return canonical(
        {"payload": base64.b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": [signature]}
    )


def _encoded(payload: bytes, kind: str) -> bytes:
    """DSSE's PAE: no payload of one type can pass for another's."""
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload)
