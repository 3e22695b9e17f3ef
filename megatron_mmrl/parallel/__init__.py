"""Ranks, devices and collectives: the only code that knows how processes are laid out."""
