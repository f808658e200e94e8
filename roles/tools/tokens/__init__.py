"""`juicebox-hsm tokens`."""
