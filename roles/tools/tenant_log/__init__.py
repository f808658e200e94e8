"""`juicebox-hsm tenant-log`."""
