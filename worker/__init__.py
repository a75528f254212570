"""What both kinds of worker are made of. Knows no role."""
