"""Experiments whose figures the README quotes: each prints JSON lines, and a table at the end."""
