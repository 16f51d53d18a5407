"""Triton templates and library calls for the canonical ops on GPUs."""

from fusecomp.lowerings import quant_registration, registration

__all__ = ["register"]


def register() -> None:
    """Bind the kernels to the canonical ops. Triton is imported when one first runs, not here."""
    registration.register()
    quant_registration.register()
