"""Recipes that ship with the house."""
