"""Asking a cluster what it is: for the manager and for tools."""
