"""The daemon and its tools: wiring only; rules live in `juicebox_hsm`."""
