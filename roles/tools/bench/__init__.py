"""`juicebox-hsm bench`."""
