"""The client edge: HTTPS for clients, our own connection loop."""
