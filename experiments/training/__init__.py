"""Runs as pure functions over arrays."""
