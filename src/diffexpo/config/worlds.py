"""Names of what the package ships: `<world>:<name>`, such as `emoji:diffusion`."""

WORLDS = ("emoji", "scenes")
"""The embedded worlds, each a module of `diffexpo.worlds`."""

WORLD_WORKS = {
    "emoji": (
        ("pictures of the emoji world", "noto_emoji"),
        ("pictures of the emoji world", "twemoji"),
        ("captions of the emoji world", "cldr"),
    ),
    "scenes": (("sprites of the scenes", "twemoji"), ("kinds of the scenes' prompts", "ghosh2023geneval")),
}
"""What a run that uses a world's files or prompts cites: purpose and key in `papers.WORKS`."""


def world_of(path: str) -> str | None:
    """The embedded world that a setting names, or None: `world_of("emoji:diffusion")` is "emoji"."""
    world, colon, _ = path.partition(":")
    return world if colon and world in WORLDS else None
