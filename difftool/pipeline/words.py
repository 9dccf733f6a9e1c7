"""Learned words (textual inversion) in a loaded model, where prompts read as their vectors.

The model's own vocabulary and weights stay as they are; nothing of it is written to a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from difftool.adapters.words import ENCODERS, Embedding, family_of_widths, read_embeddings
from difftool.errors import InputError, UsageError
from difftool.pipeline.model import Model, Word
from difftool.storage.tensors import load_located


def add_embeddings(model: Model, paths: Iterable[Path], alone: Iterable[Path] = ()) -> None:
    """Give a loaded model the words in files, and take those away that it had; each stands for its
    vectors wherever a prompt has it.

    alone: files whose own name alone is their word, whatever is said within. A name that two of
    them have is neither's. InputError if a file does not fit the model, UsageError if a word has no
    name of its own; then the model has the words that it had.
    """
    paths, alone = list(paths), list(alone)
    found = [each for path in paths for each in read_embeddings(path)] + list(map(_alone, alone))
    counts = Counter(name.lower() for embedding in found for name in embedding.names)
    rows: list[list[Tensor]] = [[] for _ in model.text]
    ids: dict[str, list[int]] = {}
    words: list[Word] = []
    total = 0
    for embedding in found:
        names = tuple(name for name in embedding.names if counts[name.lower()] == 1)
        if not names:
            also = " or ".join(embedding.names)
            raise UsageError(f"{embedding.path} has no name of its own", f"another is {also} too")
        vectors = _vectors(model, embedding)
        start, count = model.preset.text[0].vocab_size + total, len(vectors[0])
        for table, part in zip(rows, vectors, strict=True):
            table.append(part)
        ids |= {name: [*range(start, start + count)] for name in names}
        words.append(Word(embedding.path, names, start))
        total += count
    model.words, model.word_files = words, (paths, alone)
    for encoder, tokenizer, table in zip(model.text, model.tokenizers, rows, strict=True):
        if table:
            encoder.add_words(torch.cat(table).to(model.device))
            tokenizer.learned = ids


def _alone(path: Path) -> Embedding:
    """The only word in a file, by the file's own name."""
    found = read_embeddings(path)
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found)} words", hint="give it with --embedding")
    return found[0]._replace(names=(path.stem,))


def _vectors(model: Model, embedding: Embedding) -> list[Tensor]:
    """[n,d] for each text encoder of a model; InputError if they are of another family."""
    text = model.preset.text
    widths = tuple(config.width for config in text)
    slots = [ENCODERS[config.pooled] for config in text] if "" not in embedding.tables else [""]
    places = embedding.tables
    given = [place.info.shape[-1] for slot in slots if (place := places.get(slot))]
    if not widths or tuple(given) != widths or not (set(places) - {"clip_l"} <= set(slots)):
        what = f"{embedding.path} does not fit the model {model.name}"
        theirs = f"it is of {family_of_widths(embedding.widths)}"
        ours = f"{model.preset.family} of {' and '.join(map(str, widths)) or 'no'} numbers a token"
        raise InputError(what, f"{theirs}, the model is {ours}")
    tensors = load_located(places)
    pairs = zip(slots, widths, strict=True)
    made = [tensors[slot].float().reshape(-1, width) for slot, width in pairs]
    room = min(config.length for config in text) - 2
    if len(made[0]) > room:
        why = f"it has {len(made[0])} vectors, a prompt has room for {room}"
        raise InputError(f"{embedding.path} cannot be used", why)
    if not all(tensor.isfinite().all() for tensor in made):
        raise InputError(f"{embedding.path} cannot be used", "it holds numbers that are not finite")
    return made


def used_words(model: Model, prompts: Iterable[str]) -> set[Word]:
    """The words that prompts have."""
    if not model.words:
        return set()
    tokens = {token for prompt in prompts for token in model.tokenizers[0].tokens(prompt)}
    return {word for word in model.words if word.first in tokens}
