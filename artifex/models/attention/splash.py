"""tmp"""

from artifex.models.attention import tiles

attention = tiles.attention
