"""The client's configuration: which realms, how many of them, how hard a guess is (client-protocol.md 16)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urljoin

from juicebox_hsm.crypto.pin import PinHashingMode
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.addresses import is_loopback, parse_url
from juicebox_hsm.ids import ID_BYTES, RealmId

_PUBLIC_KEY_BYTES: Final = 32
_HEX: Final = re.compile(r"(?:[0-9a-fA-F]{2})+")


class ConfigurationError(LocalError, ValueError):
    """A configuration is not usable; the message says which rule it breaks."""


@dataclass(frozen=True, slots=True)
class Realm:
    """One realm. Without `public_key` (32 bytes) it is a software realm, asked in the clear inside TLS."""

    id: RealmId
    address: str
    public_key: bytes | None = None

    def __post_init__(self) -> None:
        """Check lengths and the address."""
        if len(self.id) != ID_BYTES:
            raise ConfigurationError(f"a realm id has {ID_BYTES} bytes, not {len(self.id)}")
        if self.public_key is not None and len(self.public_key) != _PUBLIC_KEY_BYTES:
            raise ConfigurationError(f"a realm's public key has {_PUBLIC_KEY_BYTES} bytes, not {len(self.public_key)}")
        try:
            parts = parse_url(self.address, ("https", "http"))
        except ValueError as error:
            raise ConfigurationError(f"a realm address is an http or https URL: {error}") from None
        if parts.scheme == "http" and not is_loopback(parts.host):
            raise ConfigurationError(
                f"a realm address with http shows tokens, and shares of software realms, to the network: use https "
                f"({self.address!r}; http is for this machine alone)"
            )

    @property
    def url(self) -> str:
        """Return the URL requests go to: the address joined with `req` (RFC 3986)."""
        return urljoin(self.address, "req")


@dataclass(frozen=True, slots=True)
class Configuration:
    """A checked configuration; `realms` are sorted by id, which numbers their shares from 1."""

    realms: tuple[Realm, ...]
    register_threshold: int
    recover_threshold: int
    pin_hashing_mode: PinHashingMode

    def __post_init__(self) -> None:
        """Check the rules and sort the realms. Raises `ConfigurationError`."""
        ordered = tuple(sorted(self.realms, key=lambda realm: realm.id))
        object.__setattr__(self, "realms", ordered)
        count = len(ordered)
        if count == 0:
            raise ConfigurationError("at least one realm is needed")
        if len({realm.id for realm in ordered}) != count:
            raise ConfigurationError("two realms have the same id")
        if not 1 <= self.recover_threshold <= count:
            raise ConfigurationError(f"recover_threshold {self.recover_threshold} is not from 1 to {count}")
        if self.recover_threshold <= count // 2:
            raise ConfigurationError(f"recover_threshold {self.recover_threshold} is not a majority of {count} realms")
        if not self.recover_threshold <= self.register_threshold <= count:
            raise ConfigurationError(
                f"register_threshold {self.register_threshold} is not from recover_threshold "
                f"{self.recover_threshold} to {count}"
            )

    def share_number(self, realm: Realm) -> int:
        """Return the number of a realm's share, from 1 in the order of ids."""
        return self.realms.index(realm) + 1

    @classmethod
    def from_json(cls, source: str | bytes | Mapping[str, object]) -> Configuration:
        """Read the SDKs' JSON configuration, as text or already parsed. Raises `ConfigurationError`."""
        if isinstance(source, str | bytes):
            try:
                members: object = json.loads(source)
            except (ValueError, RecursionError):
                raise ConfigurationError("the configuration is not JSON") from None
        else:
            members = source
        if not isinstance(members, Mapping):
            raise ConfigurationError("the configuration is not a JSON object")
        realms = members.get("realms")
        if not isinstance(realms, list | tuple):
            raise ConfigurationError("realms is not a list")
        try:
            mode = PinHashingMode(members.get("pin_hashing_mode"))
        except ValueError:
            raise ConfigurationError("pin_hashing_mode is neither Standard2019 nor FastInsecure") from None
        return cls(
            tuple(_realm(realm) for realm in realms),
            _integer(members, "register_threshold"),
            _integer(members, "recover_threshold"),
            mode,
        )

    def to_json(self) -> dict[str, object]:
        """Return the JSON object that `from_json` reads."""
        realms: list[dict[str, str]] = []
        for realm in self.realms:
            members = {"id": realm.id.hex(), "address": realm.address}
            if realm.public_key is not None:
                members["public_key"] = realm.public_key.hex()
            realms.append(members)
        return {
            "realms": realms,
            "register_threshold": self.register_threshold,
            "recover_threshold": self.recover_threshold,
            "pin_hashing_mode": self.pin_hashing_mode.value,
        }


def parse_realm_id(text: str) -> RealmId:
    """Read a realm id: 32 hex digits of either case, dashes ignored. Raises `ConfigurationError`."""
    return RealmId(_hex(text.replace("-", ""), ID_BYTES, "a realm id"))


def _realm(members: object) -> Realm:
    if not isinstance(members, Mapping):
        raise ConfigurationError("a realm is not a JSON object")
    realm_id, address, public_key = (members.get(name) for name in ("id", "address", "public_key"))
    if not isinstance(realm_id, str) or not isinstance(address, str):
        raise ConfigurationError("a realm needs id and address as text")
    if public_key is not None and not isinstance(public_key, str):
        raise ConfigurationError("a realm's public_key is not text")
    return Realm(
        parse_realm_id(realm_id),
        address,
        None if public_key is None else _hex(public_key, _PUBLIC_KEY_BYTES, "a realm's public_key"),
    )


def _hex(text: str, size: int, what: str) -> bytes:
    if _HEX.fullmatch(text) is None or len(text) != 2 * size:
        raise ConfigurationError(f"{what} is not {2 * size} hex digits")
    return bytes.fromhex(text)


def _integer(members: Mapping[str, object], name: str) -> int:
    value = members.get(name)
    if type(value) is not int:
        raise ConfigurationError(f"{name} is not an integer")
    return value
