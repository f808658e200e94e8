"""The tools of a realm."""
