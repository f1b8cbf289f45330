"""The steps random networks are made of, a writer for each; importing this names them all.

A writer appends lines to a draft and says of each where its channels lie. The first of the options
of a choice is the simplest: there a shrinking failure ends.
"""

from tools.steps import attention as attention
from tools.steps import elementwise as elementwise
from tools.steps import mixing as mixing
from tools.steps import movement as movement
