"""Condition -> Cond, the UNet's three ports."""
