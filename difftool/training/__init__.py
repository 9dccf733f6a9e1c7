"""Training: `train` from its options to a model.

options    the options as rows             run/      a run from its plan to its folder
prepared   a run, all of it decided        step/     one optimiser step, and what it depends on
metrics    what metrics.jsonl holds        report/   the page and the plots of a run
judging    a model beside a reference
"""
