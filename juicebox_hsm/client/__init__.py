"""A client of the Juicebox protocol on Trio: register, recover and delete PIN-protected secrets on n realms.

    async with Client(Configuration.from_json(text), {realm_id_hex: token}) as client:
        await client.register(b"1234", b"secret", b"info", num_guesses=5)
        secret = await client.recover(b"1234", b"info")

`flows` drives an operation over all realms, `exchange` one request to one realm, `registration` and `recovery` hold
the computations between requests, `transport` the HTTP connections.
"""

from juicebox_hsm.adapters.hsm_directory.unpacked import remove_unpacked_library
from juicebox_hsm.client.configuration import Configuration, ConfigurationError, Realm
from juicebox_hsm.client.errors import (
    AssertionFailed,
    ClientError,
    InvalidAuth,
    InvalidPin,
    NotRegistered,
    RateLimitExceeded,
    Replaced,
    Transient,
    UpgradeRequired,
)
from juicebox_hsm.client.flows import Client
from juicebox_hsm.client.transport import HttpTransport, Transport, TransportError
from juicebox_hsm.crypto.pin import PinHashingMode

remove_unpacked_library()

__all__ = [
    "AssertionFailed",
    "Client",
    "ClientError",
    "Configuration",
    "ConfigurationError",
    "HttpTransport",
    "InvalidAuth",
    "InvalidPin",
    "NotRegistered",
    "PinHashingMode",
    "RateLimitExceeded",
    "Realm",
    "Replaced",
    "Transient",
    "Transport",
    "TransportError",
    "UpgradeRequired",
]
