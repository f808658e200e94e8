"""Store a realm in one SQLite file that several processes of one machine share (storage.md 10, own tables)."""
