"""Compiled leaves of the engine: plain arrays in, output first, no allocation, no I/O."""
