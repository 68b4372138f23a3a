"""Implementations of the row operations, and which of them runs."""
