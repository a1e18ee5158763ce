"""Runs that are killed, disks that fill up or fail, files that are changed: nothing is lost or wrong."""
