"""Faults on request, for chaos runs."""
