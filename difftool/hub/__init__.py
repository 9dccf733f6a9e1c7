"""From a MODEL argument to a place on disk: runs, files, folders, models of the hub."""
