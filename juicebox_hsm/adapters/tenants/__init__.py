"""The operator's file of tenants' keys."""
