"""What strangers wrote, read within bounds: regular files, JSON, YAML and images. Nothing else in the package
parses any of these, so that a bound holds wherever such a file is read."""
