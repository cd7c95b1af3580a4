"""From raw rows to fixed rows of tokens: sources → rows → render → pack → prepare → order → stream."""
