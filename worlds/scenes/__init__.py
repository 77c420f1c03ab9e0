"""How the embedded world of scenes was made; `python -m worlds.scenes` makes it again."""
