"""What `ray job submit` runs: one small module per verb, importing training only through its entry points."""
