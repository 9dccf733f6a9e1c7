"""The forward process made visible: what `difftool noise` shows, and the numbers behind it.

    levels    where on a noise path, as numbers        figures    strips of frames: what is shown
    process   x_t from picture to static               drawing    a figure as a picture, or moving
    reverse   a model's space, and its way back        plots      curves, by matplotlib
    outputs   the files of figures                     page       a figure as a page to play with
    options   what can be asked for, as rows           animation  a figure as GIF or WebP
    command   from what is asked for to figures

All but `reverse` is torch-free. Noise comes from one generator seeded by the seed alone, so that a
picture's strip is the same alone and among others.
"""
