"""The authenticated Merkle-radix tree of records (merkle.md).

`kernel` is the door: the C implementation behind checked Python names; `walk` builds proofs from stored nodes. The
same tree in plain Python, the oracle it is compared with, is `tests/merkle_model`.
"""
