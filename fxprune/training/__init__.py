"""Training to a budget, and dead units removed on the way."""
