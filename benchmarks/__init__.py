"""Claims, measured: one script a claim, ours and the peer's in the same run."""
