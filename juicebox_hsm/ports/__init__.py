"""Ports: what the realm asks of the outside, in its own words (own: decision record 0003, storage.md part A).

Each back end implements these natively and passes the same contract suite (`tests/emulator/contract.py`). Ports have
their failures in `ports.errors`, and the values they pass in `host`, below them.

**Checkpoints.** Trio's rule that an `async` call is a checkpoint does not hold for every port method, because a trip
through the scheduler costs as much as a short read. A call may return without letting other tasks run:

* `HsmTransport.send`, when the HSM is in the same process, free, and has worked for less than 2 ms since the last
  checkpoint (`hsm_directory.hsm_host`). Requests that write NVRAM are always checkpoints.
* all reads: of `LogStore`, `NodeStore`, `EventOutbox`, `Discovery`, `Leases`, `Settings`, `TenantConfig` and
  `RealmStore`. SQLite reads in the caller's thread, and Bigtable's node cache may know every node that is asked for.

Every write that changes something is a checkpoint, and so is `RpcCaller.call`. Two things follow. A loop over the
calls in the list needs a checkpoint of its own, or it stops heartbeats. And no caller may count on none: between such a
call and its return the leadership may have ended.
"""
