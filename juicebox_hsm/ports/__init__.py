"""Ports: what the realm asks of the outside, in its own words (own: decision record 0003, storage.md part A).

Each back end implements these natively and passes the same contract suite (`tests/emulator/contract.py`). Ports have
their failures in `ports.errors`, and the values they pass in `host`, below them.
"""
