"""`juicebox-hsm cluster`."""
