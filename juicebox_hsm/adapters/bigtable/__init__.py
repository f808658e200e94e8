"""Store realms in Cloud Bigtable or its emulator (storage.md parts A and B; decision records 0003 and 0013)."""
