"""The `diffexpo` command, one file a group. Functions import heavy rooms, so that `--help` is quick."""
