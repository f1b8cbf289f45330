"""Which linear layers are one layer, what it would cost, and the cheapest way there."""
