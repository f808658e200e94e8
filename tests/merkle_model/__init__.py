"""The Merkle-radix tree in plain Python: the oracle that the C kernel is compared with, byte for byte."""
