"""Certificates, mutual TLS inside the cluster, and lean byte streams."""
