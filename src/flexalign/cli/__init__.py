"""The command line: ``app.py``, one file per command, and what commands share."""
