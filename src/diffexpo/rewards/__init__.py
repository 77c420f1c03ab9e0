"""Scorers of images and latents: higher is better. What is known of each type stands on its card in
`diffexpo.config.rewards`, in the file of the same name.
"""
