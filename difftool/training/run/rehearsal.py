"""What a run would meet later, met before its folder is made."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from difftool.adapters.lora.train import Adapters
from difftool.config.schema import Preset
from difftool.data import Dataset
from difftool.errors import UsageError
from difftool.formats.model_source import ModelSource
from difftool.pipeline.load import check_part_of
from difftool.pipeline.model import Model
from difftool.pipeline.settings import plan_sampling, resolve_settings
from difftool.training.run.validation import hold_out
from difftool.training.step import parallel
from difftool.training.step.ema import Ema
from difftool.training.step.loop import objective_class, parameters_of
from difftool.training.step.objectives import Objective
from difftool.training.step.optim import OPTIMIZERS


def rehearse(
    preset: Preset, dataset: Dataset, tokenizer_json: str | None, adopt: Mapping[str, ModelSource]
) -> None:
    """Make all that the parts of a run are made of, but for weights; UsageError or InputError for
    what cannot be.

    adopt: the models that parts start from.
    """
    model = Model(preset, tokenizer_json)
    model.adapters = Adapters.of(model.network, preset.train)
    for part in preset.parts:
        recipe = preset.recipe(part)
        assert recipe.batch_size
        hold_out(dataset, recipe.validation)
        try:
            objective = objective_class(part, recipe)(model, recipe)
            Ema.of(recipe, {})
            OPTIMIZERS[recipe.optimizer](_small(objective), recipe)
        except (ValueError, TypeError, RuntimeError) as error:
            why = str(error).split("\n")[0]
            raise UsageError(f"the {part} cannot be trained so", why) from None
        if objective.by_sample:
            parallel.local_slice(recipe.batch_size)
    plan_sampling(model, resolve_settings(model))  # of the sheets
    for part, source in adopt.items():
        check_part_of(model, source, part)


def _small(objective: Objective) -> dict[str, torch.Tensor]:
    """A small tensor for each parameter that learns, of its name and number of sides: optimisers
    tell parameters apart by these, and the model here has no weights."""
    learning = parameters_of(objective.trained() | objective.helpers())
    return {n: torch.zeros((2,) * p.dim(), requires_grad=True) for n, p in learning.items()}
