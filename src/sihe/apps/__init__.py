"""Upstairs: what is built from the wings. The coach is the last of them and may use the others."""
