"""Wire formats: what clients, balancers, agents and managers say to each other, to the byte.

`cbor` holds the conventions of the client protocol and the strict codec of trusted state, `client` the outer
messages a balancer sees, `secrets` the inner messages only an HSM and a client see, `rpc` the messages inside a
cluster. Everything here is pure; malformed input raises `errors.DecodingError` and nothing else.
"""
