"""Realm keys at rest: a sealed bundle and its wrapping key, the `file` backend of hardware.md 2.1.

The bundle (JSON, not secret) holds the three secrets sealed with XChaCha20-Poly1305 under a 32-byte wrapping key,
which lies in a file of mode 0600 beside it. Format version, realm name, backend and key generation are associated
data. This protects a copied bundle, not a copied machine: whoever reads both files has the keys, and while an HSM
runs they are in its process's memory.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cbor2
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
)
from nacl.exceptions import CryptoError

from juicebox_hsm.adapters.hsm_directory.nvram import sync_directory
from juicebox_hsm.adapters.process.passing_trouble import local_error
from juicebox_hsm.adapters.process.regular_file import open_regular
from juicebox_hsm.crypto import Random
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.errors import LocalError
from juicebox_hsm.hsm.keys import BUNDLE_BYTES, RealmKeys

FORMAT: Final = 1
BACKEND: Final = "file"
WRAPPING_KEY_BYTES: Final = 32
NONCE_BYTES: Final = 24
_FILE_BYTES_MAX: Final = 64 * 1024
_SEALED_BYTES: Final = NONCE_BYTES + BUNDLE_BYTES + 16


@dataclass(frozen=True, slots=True)
class KeyBundle:
    """Realm keys with the facts that are sealed to them."""

    realm_name: str
    generation: int
    keys: RealmKeys


def _associated_data(realm_name: str, generation: int) -> bytes:
    encoded: bytes = cbor2.dumps([FORMAT, realm_name, BACKEND, generation])
    return encoded


def write_bundle(bundle: KeyBundle, bundle_file: Path, wrapping_key_file: Path, random: Random) -> None:
    """Seal the keys under a fresh wrapping key and write both files, neither of which may exist.

    Raises `LocalError` naming the file.
    """
    wrapping_key = random(WRAPPING_KEY_BYTES)
    nonce = random(NONCE_BYTES)
    associated = _associated_data(bundle.realm_name, bundle.generation)
    sealed = nonce + crypto_aead_xchacha20poly1305_ietf_encrypt(
        bundle.keys.bundle().expose(), associated, nonce, wrapping_key
    )
    document = {
        "format": FORMAT,
        "realm_name": bundle.realm_name,
        "backend": BACKEND,
        "generation": bundle.generation,
        "public_key": bundle.keys.communication_public.hex(),
        "sealed": sealed.hex(),
    }
    _create(wrapping_key_file, wrapping_key.hex() + "\n", 0o600)
    try:
        _create(bundle_file, json.dumps(document, indent=2) + "\n", 0o644)
    except LocalError:
        wrapping_key_file.unlink()  # a wrapping key without its bundle would only block the next attempt
        raise


def _create(path: Path, text: str, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(path.parent)
    except FileExistsError:
        raise LocalError(f"{path} exists already and is never overwritten; give another name") from None
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from None


def read_bundle(bundle_file: Path, wrapping_key_file: Path) -> KeyBundle:
    """Open a sealed bundle; raises `LocalError` naming the file that is wrong and what to do."""
    document = _read_document(bundle_file)
    wrapping_key = _read_wrapping_key(wrapping_key_file)
    name, generation, public_key, sealed = document
    try:
        opened = crypto_aead_xchacha20poly1305_ietf_decrypt(
            sealed[NONCE_BYTES:], _associated_data(name, generation), sealed[:NONCE_BYTES], wrapping_key.expose()
        )
    except CryptoError:
        raise LocalError(
            f"{bundle_file}: the key bundle does not open with {wrapping_key_file}; the two belong together"
        ) from None
    keys = RealmKeys.from_bundle(opened)
    if public_key != keys.communication_public.hex():
        raise LocalError(f"{bundle_file}: the public key it shows does not belong to its sealed secret; do not use it")
    return KeyBundle(name, generation, keys)


def _read_text(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return file.read(_FILE_BYTES_MAX).decode("ascii")
    except OSError as error:
        raise local_error(f"{path}: {error.strerror}", error) from None
    except UnicodeDecodeError:
        raise LocalError(f"{path}: not a text file of ours") from None


def _read_document(path: Path) -> tuple[str, int, str, bytes]:
    try:
        document = json.loads(_read_text(path))
        name, generation, public_key = document["realm_name"], document["generation"], document["public_key"]
        sealed = bytes.fromhex(document["sealed"])
        known = document["format"] == FORMAT and document["backend"] == BACKEND
    except (ValueError, TypeError, KeyError, RecursionError):
        raise LocalError(f"{path}: not a key bundle; make one with `juicebox-hsm hsm keygen --out FILE`") from None
    if not known:
        raise LocalError(f"{path}: a key bundle of another format or backend than {FORMAT}, {BACKEND!r}")
    if type(name) is not str or type(generation) is not int or len(sealed) != _SEALED_BYTES:
        raise LocalError(f"{path}: not a key bundle; make one with `juicebox-hsm hsm keygen --out FILE`")
    return name, generation, public_key, sealed


def _read_wrapping_key(path: Path) -> Secret:
    text = _read_text(path)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise LocalError(f"{path}: others may read this wrapping key (mode {mode:04o}); run `chmod 600 {path}`")
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != WRAPPING_KEY_BYTES:
        raise LocalError(f"{path}: a wrapping key is {2 * WRAPPING_KEY_BYTES} hex digits")
    return Secret(key)
