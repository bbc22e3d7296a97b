"""Held-out loss, routing and the checks of an export."""
