"""Publish tenants' events through Google Cloud Pub/Sub or its emulator (operator-tools.md 6; decision record 0016)."""
