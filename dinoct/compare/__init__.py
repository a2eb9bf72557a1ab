"""Comparing runs: what their folders say, as a table, as files, as a page."""
