"""`juicebox-hsm demo`."""
