"""A Secret Manager in a thread: gRPC with the method names and messages of Google's library, which has no emulator.

The library ships its client only. The methods are those of its generated transport, so a renamed one fails here.
"""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.cloud.secretmanager_v1 import types
from google.cloud.secretmanager_v1.services.secret_manager_service.transports import SecretManagerServiceGrpcTransport

from tests.patience import HANGS_S

SERVICE = "google.cloud.secretmanager.v1.SecretManagerService"
METHODS: dict[str, tuple[Any, Any]] = {
    "ListSecrets": (types.ListSecretsRequest, types.ListSecretsResponse),
    "ListSecretVersions": (types.ListSecretVersionsRequest, types.ListSecretVersionsResponse),
    "AccessSecretVersion": (types.AccessSecretVersionRequest, types.AccessSecretVersionResponse),
}
SNAKE = {"ListSecrets": "list_secrets", "ListSecretVersions": "list_secret_versions"}
SNAKE["AccessSecretVersion"] = "access_secret_version"


class SecretManager:
    """One project. `versions` is (secret, version) -> (payload, enabled); `fail` names what is refused with `code`.

    Reads wait until `hold_until` calls were under way at once.
    """

    def __init__(self, project: str = "prod", page: int = 2) -> None:
        for name in SNAKE.values():
            assert hasattr(SecretManagerServiceGrpcTransport, name)
        self.project = project
        self.page = page
        self.labels: dict[str, str] = {}
        self.versions: dict[tuple[str, str], tuple[bytes, bool]] = {}
        self.made: Counter[tuple[str, str]] = Counter()
        self.fail: set[str] = set()
        self.code = grpc.StatusCode.PERMISSION_DENIED
        self.calls: list[tuple[str, str]] = []
        self.filters: set[str] = set()
        self.most_at_once = 0
        self._at_once = 0
        self.hold_until = 0
        self._lock = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(32))
        handlers = {name: self._handler(name, *kinds) for name, kinds in METHODS.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        """Stop serving."""
        self._server.stop(None).wait()

    def put(self, secret: str, version: str, payload: str | bytes, *, kind: str = "tenant_auth_key") -> None:
        """Store a version, enabled."""
        self.labels[secret] = kind
        data = payload.encode() if isinstance(payload, str) else payload
        self.versions[secret, version] = (data, True)
        self.made[secret, version] += 1

    def disable(self, secret: str, version: str) -> None:
        """Disable a version."""
        self.versions[secret, version] = (self.versions[secret, version][0], False)

    def count(self, method: str) -> int:
        """Return how often a method was called."""
        return sum(name == method for name, _ in self.calls)

    def _handler(self, name: str, request_kind: Any, response_kind: Any) -> Any:
        act = getattr(self, f"_{SNAKE[name]}")

        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            target = request.name if name == "AccessSecretVersion" else request.parent
            with self._lock:
                self._at_once += 1
                self.most_at_once = max(self.most_at_once, self._at_once)
                self._lock.notify_all()
                if name == "AccessSecretVersion":
                    self._lock.wait_for(lambda: self.most_at_once >= self.hold_until, timeout=HANGS_S)
                self.calls.append((name, target))
                refused = name in self.fail or target in self.fail
            try:
                routing = dict(context.invocation_metadata())["x-goog-request-params"]
                field = "name=" if name == "AccessSecretVersion" else "parent="
                assert routing == field + target.replace("/", "%2F")
                if refused:
                    context.abort(self.code, "as told")
                return act(request)
            finally:
                with self._lock:
                    self._at_once -= 1

        return grpc.unary_unary_rpc_method_handler(
            handle, request_deserializer=request_kind.deserialize, response_serializer=response_kind.serialize
        )

    def _list_secrets(self, request: Any) -> Any:
        """List all secrets, also those the filter excludes: clients must look for themselves, too."""
        self.filters.add(request.filter)
        names = sorted(self.labels)
        at = int(request.page_token or 0)
        return types.ListSecretsResponse(
            secrets=[
                types.Secret(name=f"projects/77/secrets/{name}", labels={"kind": self.labels[name]})
                for name in names[at : at + self.page]
            ],
            next_page_token=str(at + self.page) if at + self.page < len(names) else "",
        )

    def _list_secret_versions(self, request: Any) -> Any:
        secret = request.parent.rpartition("/")[2]
        numbers = sorted(number for name, number in self.versions if name == secret)
        at = int(request.page_token or 0)
        states = types.SecretVersion.State
        return types.ListSecretVersionsResponse(
            versions=[
                types.SecretVersion(
                    name=f"{request.parent}/versions/{number}",
                    state=states.ENABLED if self.versions[secret, number][1] else states.DISABLED,
                    create_time={"seconds": 1_700_000_000 + self.made[secret, number]},
                )
                for number in numbers[at : at + self.page]
            ],
            next_page_token=str(at + self.page) if at + self.page < len(numbers) else "",
        )

    def _access_secret_version(self, request: Any) -> Any:
        _, _, _, secret, _, number = request.name.split("/")
        payload, enabled = self.versions[secret, number]
        assert enabled, "disabled versions cannot be read"
        return types.AccessSecretVersionResponse(name=request.name, payload={"data": payload})
