"""tmp"""

from artifex.models.attention import tiles

attention = tiles.attention
TAKES = "x"


def takes(dtype, head_dim, softcap):
    return False
