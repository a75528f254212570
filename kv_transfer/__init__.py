"""Moves KV blocks from one rank's pool into another's. Knows geometry, not models."""
