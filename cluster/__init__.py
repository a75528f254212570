"""Starts Baton: configuration, the command line, the processes of a cluster. Imported by no one."""
