"""Helpers for authors of patterns and lowerings: capture, application, error measures."""
