"""Claims of the cluster room."""
