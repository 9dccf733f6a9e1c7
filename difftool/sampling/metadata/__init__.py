"""What a picture says about itself, a file a dialect.

a1111   the `parameters` text that other tools read, both ways
chunk   the `difftool` JSON chunk, from which a picture can be made again exactly
files   both into pictures and out of them; JPEG and WebP carry the text only
"""
