"""Any module to a graph, with what is no value in it: modes, sizes, attributes, lookups."""
