"""One model on some devices: paged KV, chunked prefill, batched decode, sampling. Runs with torch alone."""
