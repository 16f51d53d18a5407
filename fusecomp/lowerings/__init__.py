"""Triton templates and library calls for the canonical ops. Importing this package registers them for CUDA."""
