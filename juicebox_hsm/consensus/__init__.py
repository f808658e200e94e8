"""Authenticated consensus: log entries, statements, election and the persistent state (hsm.md 1-5, 11)."""
