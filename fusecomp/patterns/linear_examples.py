"""Callables in which linears share an input, and in which they must stay apart."""
