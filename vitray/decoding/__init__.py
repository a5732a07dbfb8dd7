"""From encoded bytes to pixels, or to the reason why there are none."""
