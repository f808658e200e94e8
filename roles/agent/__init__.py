"""The agent of a realm."""
