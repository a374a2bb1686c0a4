"""Claims of the serving room."""
