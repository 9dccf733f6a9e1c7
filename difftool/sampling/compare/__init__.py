"""Pictures of several settings, compared: every combination, and how they are laid out.

products  the combinations of listed settings, `--sampler euler,heun --steps 10,20`
"""
