"""A reward of your own: warm pictures score high.

diffexpo run emoji/expo examples/warm_reward.yaml --name warm
"""


def warmth(images, prompts):
    """Red minus blue, averaged over each picture; `images` is float32 (B, 3, H, W) in [0, 1], higher is
    better."""
    return (images[:, 0] - images[:, 2]).mean(dim=(1, 2)).tolist()
