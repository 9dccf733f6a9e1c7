"""A model at work, from its file to pictures.

model      networks, weights, tokenizers; and writing them
load       from a MODEL argument to a model
words      learned words (textual inversion) in it
condition  prompts, labels, sizes, guidance -> what conditions the network
settings   what is asked for -> a plan: settings, sampler, levels
inputs     one picture to make, and the pictures that it goes by
prior      prompts -> embeddings of pictures, where a prior says them
generate   plan and inputs -> x0, step by step
decode     x0 <-> pictures
"""
