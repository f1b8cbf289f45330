"""The rules, a file per family; importing this package registers them all."""

from fxprune.ops import attention as attention
from fxprune.ops import bilinear as bilinear
from fxprune.ops import casts as casts
from fxprune.ops import concatenation as concatenation
from fxprune.ops import contraction as contraction
from fxprune.ops import creation as creation
from fxprune.ops import elementwise as elementwise
from fxprune.ops import embedding as embedding
from fxprune.ops import gates as gates
from fxprune.ops import gather as gather
from fxprune.ops import glu as glu
from fxprune.ops import group_norm as group_norm
from fxprune.ops import indexing as indexing
from fxprune.ops import linear as linear
from fxprune.ops import movement as movement
from fxprune.ops import norm as norm
from fxprune.ops import padding as padding
from fxprune.ops import patches as patches
from fxprune.ops import pool as pool
from fxprune.ops import recurrence as recurrence
from fxprune.ops import reductions as reductions
from fxprune.ops import resampling as resampling
from fxprune.ops import sizes as sizes
from fxprune.ops import statistics as statistics
from fxprune.ops import transposition as transposition
from fxprune.ops import triangles as triangles
