"""`juicebox-hsm secrets`."""
