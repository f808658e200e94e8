"""Adapters: the only library code that does I/O; each serves a port of `juicebox_hsm.ports` or an edge of a role."""
