"""Checkpoints: the directories that contain them, and what they contain."""
