"""What workers of all kinds are made of. Knows no role."""
