"""Whether two modules are one function, by running both."""
