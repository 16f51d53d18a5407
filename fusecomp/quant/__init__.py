"""Quantized checkpoints, read as they lie on disk: formats -> canonical codes -> modules whose graph is honest."""
