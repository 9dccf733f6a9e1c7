"""How the prompts of pictures are read, for people and programs to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from difftool.pipeline.texts import Told, read_negative, read_prompt
from difftool.sampling.sample import Sample
from difftool.text.syntax import SYNTAXES, chunks


@dataclass(frozen=True)
class Reading:
    """The prompts of a picture as the network is told them."""

    sample: Sample

    def report(self) -> dict[str, Any]:
        """As a JSON object."""
        given = self.sample.input
        texts = {"prompt": given.prompt, "negative": given.negative}
        read = [part for of in texts for part in self._parts(of)]
        return {"index": self.sample.index, "seed": self.sample.seed} | texts | {"read": read}

    def lines(self) -> Iterator[str]:
        """As lines of text."""
        given = self.sample.input
        for of, text in (("prompt", given.prompt), ("negative", given.negative)):
            if of == "negative" and not text:
                continue
            yield f"{of}: {text}"
            parts = list(self._parts(of))
            for part in parts:
                if len(parts) > 1:
                    share, (first, last) = part["share"], part["evaluations"]
                    text, blended = part["text"].strip(), ""
                    if "blend" in part:
                        blended = ", blended by {:g} and weighed by {:g}".format(*part["blend"])
                    yield f"  share {share:g}, evaluations {first} to {last}{blended}: {text}"
                for number, chunk in enumerate(part["chunks"], 1):
                    words = (
                        token if weight == 1 else f"{token}*{weight:.4g}"
                        for token, _, weight in chunk["tokens"]
                    )  # fmt: skip
                    count = f"{len(chunk['tokens'])} of {chunk['room']}"
                    yield f"  chunk {number} ({count} tokens): {' | '.join(words)}"

    def _parts(self, of: str) -> Iterator[dict[str, Any]]:
        plan, given = self.sample.plan, self.sample.input
        syntax, count = plan.settings.prompt_syntax, plan.evaluations
        told: list[Told] = [read_negative(given.negative, syntax, count)]
        if of == "prompt":
            told = read_prompt(given.prompt, syntax, count)
        for each in told:
            first = 1
            for end, text in each.schedule:
                last = min(end + 1, count)
                if last < first:
                    continue
                for blend in SYNTAXES[syntax].composition(text):
                    for leaf, share in blend.texts:
                        factors = [share, blend.weight]
                        yield {
                            "of": of, "share": each.share, "evaluations": [first, last],
                            "text": leaf, **({} if factors == [1, 1] else {"blend": factors}),
                            "chunks": [*self._chunks(leaf)],
                        }  # fmt: skip
                first = last + 1

    def _chunks(self, text: str) -> Iterator[dict[str, Any]]:
        model, syntax = self.sample.plan.model, self.sample.plan.settings.prompt_syntax
        pairs = zip(model.tokenizers, model.preset.text, strict=True)
        for tokenizer, config in [*pairs][:1]:  # all of a model's have the same words
            for chunk in chunks(tokenizer, text, config.length, syntax):
                shown = (
                    [tokenizer.shown(id), id, weight]
                    for id, weight, piece in zip(*chunk, strict=True)
                    if piece >= 0
                )
                yield {"room": config.length - 2, "tokens": [*shown]}
