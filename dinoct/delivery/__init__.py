"""Handing the encoder on: exported files, what reads them, and features of a folder of CT."""
