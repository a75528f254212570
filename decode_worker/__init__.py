"""Writes answers: takes KV over, then one token of every running sequence per step."""
