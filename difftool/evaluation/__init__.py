"""How near pictures that a model made are to pictures of a reference, in features of both.

measures   Frechet distance, KID, precision and recall, of features
features   what pictures are described by: a file's network, or what needs none
judge      all of it, of a dataset and of pictures as they are made; what is kept on disk
"""
