"""Where requests come in: validates, tokenises, places, relays and streams. Runs where there is no GPU."""
