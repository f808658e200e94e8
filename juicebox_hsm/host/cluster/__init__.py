"""The managers' rules."""
