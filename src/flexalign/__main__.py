"""``python -m flexalign``: the command line, for launchers that start a module."""

from flexalign.cli.app import main

if __name__ == "__main__":
    main()
