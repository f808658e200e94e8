"""The authenticated Merkle-radix tree of records (merkle.md).

`kernel` is the door: the C implementation behind checked Python names. `model` is the same in plain Python,
the oracle of the tests; `walk` builds proofs from stored nodes; `memory` keeps a whole tree for tests.
"""
