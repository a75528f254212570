"""Names of spans and metrics, and what carries them out of the process."""
