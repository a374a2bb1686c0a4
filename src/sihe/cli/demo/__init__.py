"""The main job: one walk through every wing on real input, which can be killed at any moment and run again."""
