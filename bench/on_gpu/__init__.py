"""The pieces of `bench.gpu`."""
