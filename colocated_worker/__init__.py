"""Does both: computes prompts in chunks beside the answers that it writes."""
