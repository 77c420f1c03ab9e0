"""Settings of a run: their schema, how they are loaded, what is refused. Imports without torch."""

from diffexpo.config.load import LoadedConfig, config_to_yaml, load_config, read_resolved
from diffexpo.config.recipes import find_recipe, list_recipes
from diffexpo.config.rules import check_combinations, config_notes
from diffexpo.config.run import RunConfig

__all__ = [
    "LoadedConfig",
    "RunConfig",
    "check_combinations",
    "config_notes",
    "config_to_yaml",
    "find_recipe",
    "list_recipes",
    "load_config",
    "read_resolved",
]
