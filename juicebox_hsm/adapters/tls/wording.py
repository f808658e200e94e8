"""What went wrong with TLS, as a sentence: OpenSSL names its own functions, and files and lines of Python's module."""

from __future__ import annotations

import ssl
from typing import Final

_REASONS: Final = {
    "TLSV1_ALERT_UNKNOWN_CA": "the other side does not trust the CA of our certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the other side does not accept our certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the other side does not accept our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "our certificate has ended",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the other side wants a certificate, and we showed none",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the other side showed no certificate",
    "WRONG_VERSION_NUMBER": "what answers there does not speak TLS",
    "HTTP_REQUEST": "the other side spoke plain HTTP, this is TLS",
    "RECORD_LAYER_FAILURE": "what answers there does not speak TLS",
    "UNEXPECTED_EOF_WHILE_READING": "the connection was closed in the middle",
    "UNSUPPORTED_PROTOCOL": "the other side wants another version of TLS",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the other side wants another version of TLS",
    "NO_SHARED_CIPHER": "the two sides have no cipher in common",
    "KEY_VALUES_MISMATCH": "the private key does not belong to the certificate",
    "PEM_LIB": "a file is no whole PEM",
    "NO_START_LINE": "a file is no PEM",
    "NO_CERTIFICATE_OR_CRL_FOUND": "a file holds no certificate",
}


def tls_reason(error: ssl.SSLError) -> str:
    """Return what an error of the `ssl` module is about."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted here: {error.verify_message or 'it does not verify'}"
    reason = (error.reason or "").replace(" ", "_").upper()
    if not reason:
        return error.strerror or "TLS failed"
    return _REASONS.get(reason, f"TLS failed: {reason.lower().replace('_', ' ')}")


def reason_of(error: BaseException) -> str:
    """Return one line for an error of a file or connection; Trio's own is often empty or only says where."""
    if isinstance(error, ssl.SSLError):
        return tls_reason(error)
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    said = error if cause is None else cause
    while isinstance(said, BaseExceptionGroup):  # several addresses of one name: the first stands for all
        said = said.exceptions[0]
    if isinstance(said, ssl.SSLError):
        return tls_reason(said)
    text = said.strerror if isinstance(said, OSError) and said.strerror else str(said)
    return text or type(said).__name__
