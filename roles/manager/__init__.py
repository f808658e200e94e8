"""The manager of a realm."""
