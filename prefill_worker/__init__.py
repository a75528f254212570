"""Reads prompts: computes their KV in chunks, samples the first token, hands the KV over."""
