"""The stages of a run, by name; a method's card says which of them it has, and in which order."""

from diffexpo.online.loop import Stage
from diffexpo.online.stages import collect, improve, pair, train

STAGES: dict[str, Stage] = {
    "improver": improve.train_improver,
    "train": train.train,
    "collect": collect.collect,
    "improve": improve.improve,
    "pair": pair.pair,
}
