"""Every reason that a verdict gives, or a service that is not ready, with how much it matters.

A code is made where the fact is known and travels beside the facts; nothing is decided by reading a sentence. Sentences
are made of codes in one place, `roles.words`, and may change; the words that programs read (docs/json.md) never do.
"""

from __future__ import annotations

import enum


class Severity(enum.Enum):
    """How much a reason matters. A *problem* needs somebody to act; *advice* is worth knowing and needs nobody now."""

    PROBLEM = "problem"
    ADVICE = "advice"


_PROBLEM = Severity.PROBLEM
_ADVICE = Severity.ADVICE


class Code(enum.Enum):
    """A reason: the word by which programs know it, and its severity. Two that differ in severity only share a word."""

    NO_AGENT = ("no-agent", _PROBLEM)
    AGENT_SILENT = ("agent-silent", _PROBLEM)
    AGENT_NOT_READY = ("agent-not-ready", _PROBLEM)
    HSM_TWICE = ("hsm-twice", _PROBLEM)
    HSM_SILENT = ("hsm-silent", _PROBLEM)
    OUTBOX = ("outbox", _PROBLEM)
    NO_MANAGER = ("no-manager", _PROBLEM)
    ONE_MANAGER = ("one-manager", _PROBLEM)
    MANAGER_SILENT = ("manager-silent", _PROBLEM)
    NO_LOAD_BALANCER = ("no-load-balancer", _PROBLEM)
    ONE_LOAD_BALANCER = ("one-load-balancer", _ADVICE)
    LOAD_BALANCER_SILENT = ("load-balancer-silent", _PROBLEM)
    LOAD_BALANCER_NOT_READY = ("load-balancer-not-ready", _PROBLEM)
    CERTIFICATE = ("certificate", _PROBLEM)
    ANOTHER_STORE = ("another-store", _PROBLEM)
    CLOCK = ("clock", _PROBLEM)
    VERSIONS = ("versions", _PROBLEM)
    RANGE_UNSERVED = ("range-unserved", _PROBLEM)
    RANGE_CLAIMED_TWICE = ("range-claimed-twice", _PROBLEM)
    NO_MAJORITY = ("no-majority", _PROBLEM)
    CANNOT_COMMIT = ("cannot-commit", _PROBLEM)
    STORE_DAMAGED = ("store-damaged", _PROBLEM)
    MEMBERS_DOWN = ("members-down", _PROBLEM)
    LEADERLESS = ("leaderless", _PROBLEM)
    TOO_FEW_MEMBERS = ("too-few-members", _PROBLEM)
    FEW_MEMBERS = ("too-few-members", _ADVICE)
    TRANSFER_STUCK = ("transfer-pending", _PROBLEM)
    TRANSFER_PENDING = ("transfer-pending", _ADVICE)
    MEMBER_BEHIND = ("member-behind", _ADVICE)
    GROUP_ENDED = ("group-ended", _ADVICE)
    HSM_DRAINED = ("hsm-drained", _ADVICE)
    REBALANCING_PAUSED = ("rebalancing-paused", _ADVICE)
    # what only a service says of itself
    NOT_REGISTERED = ("not-registered", _PROBLEM)
    STOPPING = ("stopping", _ADVICE)
    NO_ANSWER = ("no-answer", _PROBLEM)
    STORE = ("store", _PROBLEM)
    STORE_REPLACED = ("store-replaced", _PROBLEM)
    REGISTRATION = ("registration", _PROBLEM)
    DISCOVERY = ("discovery", _PROBLEM)
    LOG_NOT_FOLLOWED = ("log-not-followed", _PROBLEM)
    COMPACTION = ("compaction", _PROBLEM)
    GROUP_NOT_LEFT = ("group-not-left", _PROBLEM)
    OUTBOX_UNREADABLE = ("outbox-unreadable", _PROBLEM)
    EVENTS_NOT_DISPATCHED = ("events-not-dispatched", _PROBLEM)
    EVENTS_SET_ASIDE = ("events-set-aside", _PROBLEM)
    BUS = ("bus", _PROBLEM)
    SECRETS_STALE = ("secrets-stale", _PROBLEM)
    CERTIFICATE_NOT_VALID = ("certificate-not-valid", _PROBLEM)
    NO_REALMS = ("no-realms", _PROBLEM)
    RECORD_ID_KEY = ("record-id-key", _PROBLEM)
    RECORD_ID_KEY_UNCHECKED = ("record-id-key-unchecked", _PROBLEM)
    OTHER = ("other", _PROBLEM)
    """What a service of another version says and this one has no name for."""

    @property
    def word(self) -> str:
        """Return the word that programs read; it never changes."""
        return self.value[0]

    @property
    def severity(self) -> Severity:
        """Return how much the reason matters."""
        return self.value[1]


def code_of(word: str) -> Code:
    """Return the code that another service names by `word`, the graver one of two; `OTHER` for one not known here."""
    return next((code for code in Code if code.word == word), Code.OTHER)
