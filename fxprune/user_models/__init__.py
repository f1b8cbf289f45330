"""A model as its user made it: checked, copied, run, and what its forward does beside computing."""
