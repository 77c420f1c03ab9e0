"""Scenes: small images of emoji sprites whose prompts say exactly what has to be seen (no torch at import).

A prompt names one or two kinds of things with their colours, counts and relative position, or one person at
work, in the manner of GenEval (arXiv 2310.11513). `grammar` holds the prompts, `compose` draws true images
of them; whether a generated image is right is decided by the checkers of `diffexpo.rewards.scenes`.
"""
