"""The passes: the verbs of fxprune, one to a file.

A pass is a function `(program) -> list[Change]`. It edits the program in place, leaves it valid,
and returns what it changed: an empty list means that it found nothing to do. Passes do not import
one another; `fxprune.compiler` says which run, in which order, and why.

The folder lies beside the package and is part of it through the link `fxprune/passes`.
"""

if __name__ != "fxprune.passes":  # a second copy would have its own registries
    raise ImportError(f"the passes are imported as fxprune.passes, not as {__name__}")
