"""Judging an encoder without labels."""
