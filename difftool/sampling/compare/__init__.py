"""Pictures of several settings, compared: every combination, and how they are laid out.

products  the combinations of listed settings, `--sampler euler,heun --steps 10,20`
layout    which picture stands where on a grid
page      a page of HTML in which two are compared
gallery   takes pictures as they are made, and writes the grid or the page
"""
