"""Checks that a user runs before trusting a layout or a checkpoint."""
