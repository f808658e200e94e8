"""`juicebox-hsm chaos`."""
