"""`juicebox-hsm config`."""
