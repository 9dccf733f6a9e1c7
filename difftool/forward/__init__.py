"""The forward process made visible: what `difftool noise` shows, and the numbers behind it.

    levels    where on a noise path, as numbers        sheets     rows of frames: what is shown
    process   x_t from picture to static               drawing    a sheet as a picture, or moving
    reverse   a model's space, and its way back        plots      curves, by matplotlib
    outputs   a sheet as a file of any kind            page       a sheet as a page to play with
    show      from what is asked for to a sheet        animation  a sheet as GIF or WebP

All but `reverse` is torch-free. Noise comes from one generator seeded by the seed alone, so that a
picture's strip is the same alone and among others.
"""
