"""Signatures of cache entries: by whom they were made, for a cache that others can write to. Ed25519, of a manifest's bytes.

A manifest has the digest of its shard, so whoever can write both can make a pair that fits; a signature takes the key. Keys are
PEM files as openssl makes them: private ones sign and verify, public ones verify.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.store.shards import manifest_path, write_text
from schemas.errors import OpdError, one_line


def signature_path(entry: Path) -> Path:
    """Where the signature of an entry, or of what a link points to, lies: hex."""
    return entry.resolve().with_suffix(".sig")


def sign(entry: Path, keys: Sequence[Path]) -> None:
    """Sign an entry with the first private key. Raises OpdError when there is none, or it can't be read."""
    write_text(signature_path(entry), signing_key(keys).sign(manifest_path(entry).read_bytes()).hex() + "\n")


def signing_key(keys: Sequence[Path]) -> Any:
    """The first private key. Raises OpdError when there is none, or it can't be read."""
    for key in map(_read, keys):
        if hasattr(key, "sign"):
            return key
    raise OpdError(f"{', '.join(map(str, keys))}: no private key to sign with; name one that is (`cache_keys`, --key)")


def check_signature(entry: Path, keys: Sequence[Path]) -> None:
    """Raise OpdError unless one of the keys made the entry's signature. Whether the shard is the manifest's is not asked."""
    public = [key.public_key() if hasattr(key, "sign") else key for key in map(_read, keys)]
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - an extra; `_read` says which

    where = signature_path(entry)
    try:
        signature, told = bytes.fromhex(where.read_text().strip()), manifest_path(entry.resolve()).read_bytes()
    except FileNotFoundError as error:
        raise OpdError(
            f"{entry}: not signed; if it is your own, `opd cache sign --key <your private key>`, else remove it"
        ) from error
    except (OSError, ValueError) as error:
        raise OpdError(f"{where}: no signature: {one_line(error)}; remove it and its entry") from error
    for key in public:
        try:
            key.verify(signature, told)
            return
        except InvalidSignature:
            continue
    raise OpdError(
        f"{entry}: its signature is of none of {', '.join(map(str, keys))}; remove the entry, or add its maker's key"
    )


def _read(file: Path) -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key  # noqa: PLC0415
    except ImportError as error:
        raise OpdError(
            f"{file}: signatures need a package that is not installed: pip install 'offline-opd[sign]'"
        ) from error
    try:
        text = file.read_bytes()
        key = load_pem_private_key(text, None) if b"PRIVATE KEY" in text else load_pem_public_key(text)
    except OSError as error:
        raise OpdError(f"{file}: cannot read: {error.strerror}") from error
    except Exception as error:  # of any kind: what a file that is no key, or has a passphrase, ends in
        raise OpdError(f"{file}: no key in PEM without a passphrase: {one_line(error)}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey | ed25519.Ed25519PublicKey):
        raise OpdError(f"{file}: an Ed25519 key is asked for; `openssl genpkey -algorithm ed25519` makes one")
    return key
