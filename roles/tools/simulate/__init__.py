"""A whole realm in one thread, from one seed (docs/adr; ARCHITECTURE.md)."""
