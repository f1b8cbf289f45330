"""A model in parts that are programs: which these are, and what is done to each."""
