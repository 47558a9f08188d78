"""The command line: ``app.py`` and one thin file per command."""
