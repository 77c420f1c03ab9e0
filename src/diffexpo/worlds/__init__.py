"""What the embedded worlds need at run time; the code that made them stands in `worlds/` of the repository."""
