"""`turned`: a matrix laid out by columns.

Every twin has `turned(source, out)`: out `[C, R]`, of any type, is written with source `[R, C]`, turned; rows of out are contiguous.
"""
