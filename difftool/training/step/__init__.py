"""One optimiser step: loop.py says in 15 lines what it is, the other files how.

batches, frames, cache    samples by coordinates; frozen networks' outputs, made once
objectives, perception    what each part of a model learns, and what only helps it to learn
optim, muon, ema          from gradients to weights, and their moving averages
rng                       random numbers as functions of seed and place
record, parallel, state   what is measured; several processes; checkpoints
"""
