"""What one GPU gives: true Gemma 3 configs with random weights, through the product's own loop, in ten minutes."""
