"""``python -m mmbase``: the command line."""

from mmbase.cli import main

main()
