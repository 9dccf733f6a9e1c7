"""A run: start.py decides all of it, and gives it as a training.prepared.Training.

plan, stages, estimate    what is trained, how far it is, and what it takes; before anything is made
run                       one part, step by step, with checkpoints and what it shows
folder, facts             its files, under a lock
previews, validation      samples, and what is measured of them and of held-out pictures
stop                      signals
"""
