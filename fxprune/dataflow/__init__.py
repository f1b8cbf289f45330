"""Which channels are tied, constant or live, and what remains when some go."""
