"""`juicebox-hsm check`."""
