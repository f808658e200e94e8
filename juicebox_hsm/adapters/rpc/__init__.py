"""The internal RPC of the cluster: framed MessagePack over mutual TLS (agent.md 2)."""

from juicebox_hsm.adapters.rpc.client import RpcConnection
from juicebox_hsm.adapters.rpc.errors import RpcError, RpcFailed, RpcUnreachable
from juicebox_hsm.adapters.rpc.frames import FrameError, FrameTooLarge
from juicebox_hsm.adapters.rpc.pool import RpcPool
from juicebox_hsm.adapters.rpc.server import Caller, Handler, RpcServer, handles, serve_rpc

__all__ = [
    "Caller",
    "FrameError",
    "FrameTooLarge",
    "Handler",
    "RpcConnection",
    "RpcError",
    "RpcFailed",
    "RpcPool",
    "RpcServer",
    "RpcUnreachable",
    "handles",
    "serve_rpc",
]
