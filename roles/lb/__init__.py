"""The lb of a realm."""
