"""The algorithm's loop and its phases."""
