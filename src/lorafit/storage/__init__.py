"""Atomic writes, locks, the cache folder, and reading with a limit."""
