"""Text to tokens and back: tokenizer, chat template, incremental detokeniser, stop strings. No torch."""
