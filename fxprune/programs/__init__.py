"""A graph and inputs it runs on: what a run of it shows, and passes over it."""
