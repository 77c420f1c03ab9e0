"""Makes the embedded emoji world: images and captions, small base models, judges, offline pairs.

`python -m worlds.emoji --help` lists what can be made and measured. The parts that the package reads at run
time are `diffexpo.worlds.emoji`.
"""
