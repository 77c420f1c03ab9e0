"""The `diffexpo` command, one file a group. Heavy rooms are imported inside the functions, so that `--help`
is quick."""
