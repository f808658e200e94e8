"""`juicebox-hsm hsm`."""
