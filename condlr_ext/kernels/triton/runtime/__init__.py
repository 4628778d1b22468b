"""Shared parts of all launches: tables on the device, and programs that work in groups."""
