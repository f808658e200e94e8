"""The simulator's store and judge."""
