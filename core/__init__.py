"""Words that all of Baton's processes share. Standard library only."""
