"""`juicebox-hsm store`."""
