"""Secrets from Secret Manager: names, labels, versions, refresh and what failures leave in use (load-balancer.md 7)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
import trio

from juicebox_hsm.adapters.google.calls import Access, open_calls
from juicebox_hsm.adapters.google.secret_manager import SECRET_MANAGER, CloudSecrets
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.ports.observation import Tag
from juicebox_hsm.tenant_keys import RECORD_ID_KEY_NAME, SecretAlgorithm, SecretError
from tests.fakes.secret_manager import SecretManager
from tests.patience import HANGS_S
from tests.sink import Sink

ATTEMPTS = 3
QUICK = RetryProfile(first_s=0.01, cap_s=0.02, attempts_max=ATTEMPTS, total_s=5.0)


def payload(data: str = "00ff" * 16, algorithm: str = "HmacSha256", encoding: str = "Hex") -> str:
    """Return a payload as the document describes it."""
    return json.dumps({"data": data, "encoding": encoding, "algorithm": algorithm})


class Recorder(Sink):
    """Metrics and log."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.gauges: dict[str, float] = {}
        self.warnings: list[str] = []

    def count(self, name: str, n: int = 1, **tags: Tag) -> None:
        """Count."""
        self.counts[name] += n

    def gauge(self, name: str, value: float, **tags: Tag) -> None:
        """Remember."""
        self.gauges[name] = value

    def warning(self, event: str, **fields: object) -> None:
        """Remember."""
        self.warnings.append(f"{event} {fields}")


@pytest.fixture
def server() -> Iterator[SecretManager]:
    """Serve a project with a record id key and one tenant."""
    made = SecretManager()
    made.put(RECORD_ID_KEY_NAME, "1", payload("ab" * 32, "Blake2sMac256"), kind="record_id_randomization_key")
    made.put("tenant-acme", "1", payload())
    yield made
    made.stop()


@pytest.fixture
def recorder() -> Recorder:
    """Record what is told."""
    return Recorder()


@pytest.fixture
async def secrets(server: SecretManager, recorder: Recorder) -> AsyncIterator[CloudSecrets]:
    """Connect; nothing is read yet."""
    async with open_calls(SECRET_MANAGER, Access("prod", server.address)) as calls:
        yield CloudSecrets(calls, "prod", metrics=recorder, log=recorder, retry=QUICK)


async def test_names_labels_and_versions(server: SecretManager, secrets: CloudSecrets) -> None:
    """Only our names with their labels are read, only enabled versions that are numbers, over all pages."""
    for version in ("2", "3", "7", "10"):
        server.put("tenant-acme", version, payload(f"{int(version):02x}" * 32))
    server.disable("tenant-acme", "3")
    server.put("tenant-acme", "latest", "not read")
    server.put("tenant-test-acme", "4", payload("a key of a tenant in UTF-8 text!", encoding="UTF8"))
    server.put("tenant-other", "1", "not ours", kind="something_else")
    server.put("database-password", "1", "secret of somebody else")
    await secrets.load()
    assert sorted(secrets.versions("tenant-acme")) == [1, 2, 7, 10]
    assert sorted(secrets.versions("tenant-test-acme")) == [4]
    assert secrets.versions("tenant-other") == secrets.versions("database-password") == {}
    assert secrets.versions(RECORD_ID_KEY_NAME)[1].algorithm is SecretAlgorithm.BLAKE2S_MAC256
    assert secrets.token_key("acme", 7) is not None
    assert secrets.token_key("acme", 3) is None
    assert not [name for name, target in server.calls if "other" in target or "password" in target]
    (asked,) = server.filters
    record_id, tenants = asked.split(" OR ")
    assert record_id == "(name:record-id-randomization AND labels.kind=record_id_randomization_key)"
    assert tenants == "(name:tenant- AND labels.kind=tenant_auth_key)"


async def test_refresh_reads_only_what_is_new(server: SecretManager, secrets: CloudSecrets) -> None:
    """A version is read once; new ones appear, disabled ones go, and unchanged keys stay the same objects."""
    await secrets.load()
    key, reads = secrets.token_key("acme", 1), server.count("AccessSecretVersion")
    server.put("tenant-acme", "2", payload("11" * 32))
    await secrets.refresh()
    assert server.count("AccessSecretVersion") == reads + 1
    assert secrets.token_key("acme", 1) is key
    server.disable("tenant-acme", "1")
    await secrets.refresh()
    assert sorted(secrets.versions("tenant-acme")) == [2]
    assert secrets.token_key("acme", 1) is None


async def test_a_secret_that_was_made_again(server: SecretManager, secrets: CloudSecrets) -> None:
    """A secret that was deleted and made again begins at version 1 with other content, which is noticed."""
    await secrets.load()
    server.put("tenant-acme", "1", payload("22" * 32))
    await secrets.refresh()
    assert secrets.versions("tenant-acme")[1].data.expose() == bytes.fromhex("22" * 32)


async def test_one_bad_version_holds_up_nothing(
    server: SecretManager, secrets: CloudSecrets, recorder: Recorder
) -> None:
    """A version that cannot be read is left out or keeps its last good value; the rest advances; one warning each."""
    await secrets.load()
    server.put("tenant-acme", "1", payload("33" * 32))  # made again, but unreadable now
    server.fail = {"projects/77/secrets/tenant-acme/versions/1"}
    server.put("tenant-acme", "2", '{"data": "zz", "encoding": "Hex", "algorithm": "HmacSha256"}')
    server.put("tenant-b", "1", payload("44" * 32))
    for _ in range(2):
        await secrets.refresh()
        assert secrets.versions("tenant-acme")[1].data.expose() == bytes.fromhex("00ff" * 16)
        assert sorted(secrets.versions("tenant-acme")) == [1]
        assert sorted(secrets.versions("tenant-b")) == [1]
    warned = [each for each in recorder.warnings if "cannot be used" in each]
    assert len(warned) == 2
    assert "zz" not in str(warned)
    assert recorder.counts["secrets.refresh.failures"] == 4
    assert secrets.age_s() < 5


async def test_an_outage_keeps_everything(server: SecretManager, secrets: CloudSecrets, recorder: Recorder) -> None:
    """While nothing can be listed all secrets stay, the failure is counted, and what comes afterwards is taken."""
    await secrets.load()
    server.code = grpc.StatusCode.UNAVAILABLE
    server.fail = {"ListSecrets"}
    listed = server.count("ListSecrets")
    await secrets.refresh()
    assert server.count("ListSecrets") == listed + ATTEMPTS
    assert sorted(secrets.versions("tenant-acme")) == [1]
    server.fail = {"ListSecretVersions"}
    await secrets.refresh()
    assert sorted(secrets.versions("tenant-acme")) == [1]
    assert recorder.counts["secrets.refresh.failures"] == 2
    server.fail = set()
    server.put("tenant-acme", "2", payload("11" * 32))
    await secrets.refresh()
    assert sorted(secrets.versions("tenant-acme")) == [1, 2]


@pytest.mark.parametrize("what", ["ListSecrets", "ListSecretVersions", "AccessSecretVersion"])
async def test_any_failure_at_start_is_told(server: SecretManager, secrets: CloudSecrets, what: str) -> None:
    """At start everything must be readable: a missing right or an outage is the caller's to report."""
    server.fail = {what}
    with pytest.raises(StoreUnavailable, match=what):
        await secrets.load()


async def test_bad_payloads_at_start(server: SecretManager, secrets: CloudSecrets) -> None:
    """Payloads that are not the JSON are refused, naming secret and version and never the data."""
    server.put("tenant-raw", "5", "just a hexless key")
    with pytest.raises(SecretError, match="tenant-raw version 5") as refused:
        await secrets.load()
    assert "hexless" not in str(refused.value)


async def test_raw_secrets(server: SecretManager, recorder: Recorder) -> None:
    """With the migration aid tenants' payloads that are no JSON object are raw HMAC keys, with a warning each."""
    server.put("tenant-raw", "5", b"\xff raw key that is not even text")
    async with open_calls(SECRET_MANAGER, Access("prod", server.address)) as calls:
        secrets = CloudSecrets(calls, "prod", raw=True, metrics=recorder, log=recorder, retry=QUICK)
        await secrets.load()
        assert secrets.versions("tenant-raw")[5].data.expose() == b"\xff raw key that is not even text"
        assert secrets.versions("tenant-raw")[5].algorithm is SecretAlgorithm.HMAC_SHA256
        assert len([each for each in recorder.warnings if "raw HMAC key" in each]) == 1
        server.put("tenant-typo", "1", '{"data": "00", "encoding": "hex", "algorithm": "HmacSha256"}')
        server.put(RECORD_ID_KEY_NAME, "2", "raw", kind="record_id_randomization_key")
        await secrets.refresh()
        assert secrets.versions("tenant-typo") == {}
        assert sorted(secrets.versions(RECORD_ID_KEY_NAME)) == [1]


async def test_reads_are_bounded(server: SecretManager, secrets: CloudSecrets) -> None:
    """However many tenants there are, at most 16 calls are under way."""
    server.page, server.hold_until = 50, 16
    for number in range(60):
        server.put(f"tenant-t{number}", "1", payload())
    await secrets.load()
    assert server.most_at_once == 16
    assert secrets.token_key("t59", 1) is not None


async def test_periodic_refresh(
    server: SecretManager, secrets: CloudSecrets, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    """Refreshing goes on by itself, every minute unless told otherwise."""
    assert secrets.refresh_s == 60
    monkeypatch.setattr(CloudSecrets, "refresh_s", 0.01)
    await secrets.load()
    server.put("tenant-acme", "2", payload("11" * 32))
    with trio.fail_after(HANGS_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(secrets.refresh_forever)
            while secrets.token_key("acme", 2) is None:  # noqa: ASYNC110 - what is waited for has no event
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()


async def test_calls_are_measured(server: SecretManager, recorder: Recorder) -> None:
    """Each kind of call has time and errors by its specified name, and each repetition counts."""
    metrics = Metrics()
    async with open_calls(SECRET_MANAGER, Access("prod", server.address), metrics) as calls:
        secrets = CloudSecrets(calls, "prod", metrics=recorder, log=recorder, retry=QUICK)
        await secrets.load()
        for name, count in (("list_secrets", 1), ("list_secret_versions", 2), ("access_secret_version", 2)):
            assert metrics.timer(f"secret_manager.google.{name}.time", result="ok").count == count, name
        server.fail, server.code = {"ListSecrets"}, grpc.StatusCode.UNAVAILABLE
        with pytest.raises(RealmError):
            await secrets.load()
    family = "secret_manager.google.list_secrets"
    assert metrics.timer(f"{family}.time", result="exhausted").count == 1
    assert metrics.counter(f"{family}.exhausted_errors").value == 1
    assert metrics.counter(f"{family}.retryable_errors").value == ATTEMPTS


async def test_nobody_answers(recorder: Recorder) -> None:
    """Without a service the start fails after the retries."""
    async with open_calls(SECRET_MANAGER, Access("prod", "127.0.0.1:1")) as calls:
        with pytest.raises(RealmError):
            await CloudSecrets(calls, "prod", metrics=recorder, log=recorder, retry=QUICK).load()
