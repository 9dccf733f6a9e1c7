"""Training: `train` from its options to a model.

options   the options as rows              run/      a run from its plan to its folder
metrics   what metrics.jsonl holds         step/     one optimiser step, and what it depends on
judging   a model beside a reference       report/   the page and the plots of a run
"""
