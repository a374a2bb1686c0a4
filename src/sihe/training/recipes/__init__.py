"""Post-training recipes: from a base model to one that follows instructions, preferences and rewards."""
