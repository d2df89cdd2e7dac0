"""Set-up and launching. Standard library, and PyYAML in site.py: it must import on a login node without torch."""
