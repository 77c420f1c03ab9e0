"""What is known of a reward stands on its card: no room beside `config/rewards` and `rewards` tells types apart."""

import ast

from diffexpo.config.rewards import CARDS, REWARDS
from tests.architecture import tree
from tests.architecture.tree import SOURCE, nodes_of

FILES = [
    path
    for path in tree.FILES
    if not path.is_relative_to(SOURCE / "rewards") and not path.is_relative_to(SOURCE / "config" / "rewards")
]
NAMES = {card.__name__ for card in CARDS}
# Words that mean something else too; as types of rewards they are found where they stand beside `.type`.
PLAIN_WORDS = {"python"}


def test_no_room_tells_rewards_apart() -> None:
    found = []
    for path in FILES:
        place = path.relative_to(SOURCE).as_posix()
        for node in nodes_of(path):
            if isinstance(node, ast.Name | ast.Attribute):
                name = node.id if isinstance(node, ast.Name) else node.attr
                found += [f"{place}:{node.lineno} {name}"] if name in NAMES else []
            if isinstance(node, ast.Compare):
                words = {inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)}
                asks_type = any(
                    isinstance(inner, ast.Attribute) and inner.attr == "type" for inner in ast.walk(node)
                )
                wrong = words & set(REWARDS) - (set() if asks_type else PLAIN_WORDS)
                found += [f"{place}:{node.lineno} {ast.unparse(node)}"] if wrong else []
    assert not found, "a fact is missing on the card:\n" + "\n".join(found)
