"""The code that made the embedded worlds; it runs from a checkout and is no part of the installed package."""
