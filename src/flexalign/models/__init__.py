"""Models: where they come from, loading, the pair of them, and weights between the two."""
