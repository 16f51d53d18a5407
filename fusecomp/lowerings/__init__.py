"""Triton templates and library calls for the canonical ops on GPUs."""

from fusecomp.lowerings.registration import register

__all__ = ["register"]
