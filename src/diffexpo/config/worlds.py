"""Names of what the package ships: `<world>:<name>`, such as `emoji:diffusion`."""

WORLDS = ("emoji", "scenes")
"""The embedded worlds, each a module of `diffexpo.worlds`."""


def world_of(path: str) -> str | None:
    """The embedded world that a setting names, or None: `world_of("emoji:diffusion")` is "emoji"."""
    world, colon, _ = path.partition(":")
    return world if colon and world in WORLDS else None
