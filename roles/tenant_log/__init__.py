"""The service that tells tenants their events."""
