"""The untrusted side's rules: pure, like the core (ARCHITECTURE.md)."""
