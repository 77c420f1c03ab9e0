"""What the embedded worlds need at run time; `worlds/` of the repository holds the code that made them."""
