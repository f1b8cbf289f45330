"""Where gates go, what they would save, and what runs of a gated graph."""
