"""Set-up and launching. Standard library only: it must import on a login node without torch."""
