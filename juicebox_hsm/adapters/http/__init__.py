"""HTTP surfaces: the client edge (`edge`) and the probes of every role (`probes`)."""
