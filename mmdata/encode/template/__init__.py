"""Rendering of conversations by a tokenizer's chat template.

Modules: `template` (rendering, and cutting into segments), `segments`, `turns` (what a template writes around answers),
`calls` (forms of tool calls), `traced` (strings that record their origin), `stand_ins` (strings that record what a template
asks of them), and `losses` (what a template leaves out).
"""

from mmdata.encode.template.segments import Segment, stretches
from mmdata.encode.template.template import ERAS, TRAIN_ON, Ending, Template, ending_of
from mmdata.encode.template.turns import EMPTY_THINK

__all__ = ["EMPTY_THINK", "ERAS", "TRAIN_ON", "Ending", "Segment", "Template", "ending_of", "stretches"]
