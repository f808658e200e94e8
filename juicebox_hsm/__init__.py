"""The library of a Juicebox realm: protocol, tree, consensus, HSM core, adapters and client.

The core packages (`errors`, `ids`, `wire`, `crypto`, `merkle`, `consensus`, `hsm`, `tokens`) are pure:
no I/O, no clock, no global randomness. `tests/test_layers.py` keeps them so.
"""

__version__ = "0.1.0"
