"""Byte-pair tokenizers: CLIP's (Radford et al. 2021), and small ones learned from captions.

A vocabulary is a function of its list of merges, so a list of merges is all that is ever stored.
Both start from the 256 bytes, so that every prompt has an encoding. Torch-free.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftool.config.networks import LEARNED_MARKS
from difftool.errors import InputError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

Merges = list[tuple[str, str]]

MERGES_FILE = Path(__file__).with_name("clip_merges.txt.gz")
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)
# A word takes the space before it along, which tells "no where" from "nowhere".
LEARNED_WORD = r" ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+"


class Tokenizer:
    """Prompts to token ids below `vocab_size`, marked with `start_id`, `end_id` and `pad_id`."""

    def __init__(
        self, backend: Backend, *, vocab_size: int, start_id: int, end_id: int, pad_id: int,
        description: dict[str, Any],
    ):  # fmt: skip
        self._backend = backend
        self._description = description
        self.vocab_size = vocab_size
        self.start_id, self.end_id, self.pad_id = start_id, end_id, pad_id
        self.reads_padding = False
        """Whether the padding token's text in a prompt reads as padding: with OpenCLIP's "!" it
        does in transformers, and it did not where the models were trained."""
        self.learned: Mapping[str, Sequence[int]] = {}
        """Ids of words learned elsewhere, beyond the vocabulary, by the word."""

    @classmethod
    def clip(cls, pad_id: int | None = None) -> Tokenizer:
        """CLIP's tokenizer; short prompts are filled with pad_id, by default the end mark."""
        backend = _clip_backend()
        size = backend.get_vocab_size()
        start, end = size - 2, size - 1
        pad = end if pad_id is None else pad_id
        if not 0 <= pad < size:
            raise UsageError(f"pad_id {pad} is not a token", f"CLIP's vocabulary has {size}")
        return cls(
            backend, vocab_size=size, start_id=start, end_id=end, pad_id=pad,
            description={"kind": "clip", "pad_id": pad},
        )  # fmt: skip

    @classmethod
    def learn(cls, captions: Iterable[str], size: int) -> Tokenizer:
        """A vocabulary of at most `size` tokens learned from captions, in whatever order they come.

        Smaller where the captions have fewer repeated words; UsageError if size < 259.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE
        from tokenizers.trainers import BpeTrainer

        symbols, least = _symbols(), len(LEARNED_MARKS) + 256
        if size < least:
            raise UsageError(f"vocabulary size {size} is too small", hint=f"give at least {least}")
        backend = _with_learned_words(Backend(BPE()))
        # Equal counts are decided by the symbols' ids, which the alphabet and the marks fix.
        trainer = BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            initial_alphabet=symbols,
            special_tokens=list(LEARNED_MARKS),
            show_progress=False,
        )
        backend.train_from_iterator(map(_valid, captions), trainer)
        merges = json.loads(backend.to_str())["model"]["merges"]
        return cls._learned([(left, right) for left, right in merges])

    @classmethod
    def _learned(cls, merges: Merges) -> Tokenizer:
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE

        vocab = _vocabulary([*LEARNED_MARKS, *_symbols()], merges)
        pad, start, end = range(len(LEARNED_MARKS))
        return cls(
            _with_learned_words(Backend(BPE(vocab=vocab, merges=merges))),
            vocab_size=len(vocab), start_id=start, end_id=end, pad_id=pad,
            description={"kind": "learned", "merges": [" ".join(pair) for pair in merges]},
        )  # fmt: skip

    def to_json(self) -> str:
        """Text that `from_json` makes the same tokenizer of; a few kilobytes."""
        return json.dumps(self._description, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer that `to_json` described; InputError if the text is not one."""
        try:
            match json.loads(text):
                case {"kind": "clip", "pad_id": int(pad_id), **rest} if not rest:
                    return cls.clip(pad_id)
                case {"kind": "learned", "merges": list(lines), **rest} if not rest:
                    return cls._learned([_pair(line) for line in lines])
            raise ValueError("its kind is unknown")
        except (ValueError, RecursionError, UsageError) as error:
            raise InputError("the stored tokenizer is malformed", str(error)) from None

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt, all of them, without marks."""
        if not self.learned:
            return self._text(prompt)
        return [token for ids in self.units(prompt) for token in ids]

    def units(self, prompt: str) -> Iterator[Sequence[int]]:
        """The same, by what must not be parted: a token, or all of a word learned elsewhere."""
        pattern, end = _spelled(self.learned) if self.learned else r"(?!)", 0
        for match in re.finditer(pattern, prompt, re.IGNORECASE):
            yield from ([token] for token in self._text(prompt[end : match.start()]))
            end = match.end()
            same = (w for w in self.learned if re.fullmatch(re.escape(w), match[2], re.IGNORECASE))
            yield self.learned[next(same)]
        yield from ([token] for token in self._text(prompt[end:]))

    def _text(self, prompt: str) -> list[int]:
        if not self.reads_padding:
            return self._tokens(prompt)
        text = str(self._backend.id_to_token(self.pad_id))
        first, *rest = (self._tokens(part) for part in prompt.split(text))
        return first + [token for part in rest for token in (self.pad_id, *part)]

    def _tokens(self, prompt: str) -> list[int]:
        # One at a time: batches start threads, which forked data loader workers warn about.
        return self._backend.encode(_valid(prompt), add_special_tokens=False).ids

    def ends_word(self, token: int) -> bool:
        """Whether a word ends with a token, as far as the vocabulary says."""
        text = str(self._backend.id_to_token(token) or "")
        return self._description["kind"] != "clip" or text.endswith("</w>")

    def shown(self, token: int) -> str:
        """The text of a token, for people to read."""
        for word, ids in self.learned.items():
            if token in ids:
                return word if len(ids) == 1 else f"{word}/{ids.index(token) + 1}"
        from tokenizers.decoders import ByteLevel

        text = str(self._backend.id_to_token(token) or "")
        return str(ByteLevel().decode([text.removesuffix("</w>")])).strip()

    def count(self, prompt: str) -> int:
        """How many tokens a prompt has, marks left out: more than length - 2 are cut off."""
        return len(self.tokens(prompt))

    def encode(self, prompts: Sequence[str], length: int) -> list[list[int]]:
        """Rows of `length` ids: start mark, tokens (cut to fit), end mark, padding."""
        if length < 2:
            raise ValueError(f"length {length} has no room for the start and end marks")
        rows = [
            [self.start_id, *self.tokens(prompt)[: length - 2], self.end_id] for prompt in prompts
        ]
        return [row + [self.pad_id] * (length - len(row)) for row in rows]


def _spelled(words: Iterable[str]) -> str:
    """A pattern of words, the longest first; as ComfyUI and InvokeAI write them, embedding:WORD and
    <WORD>, too. What begins or ends with a letter does not do so within another word."""

    def bounded(word: str) -> str:
        edges = [r"\b" if re.match(r"\w", letter) else "" for letter in (word[0], word[-1])]
        return edges[0] + re.escape(word) + edges[1]

    names = "|".join(map(bounded, sorted(words, key=len, reverse=True)))
    return rf"(?:\bembedding:|(<))?({names})(?(1)>)"


def _valid(text: str) -> str:
    """Text without lone surrogates, which command lines contain for bytes that are not UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _pair(line: object) -> tuple[str, str]:
    match line.split(" ") if isinstance(line, str) else ():
        case [left, right]:
            return left, right
    raise ValueError(f"{line!r} is not a merge")


def _symbols() -> list[str]:
    """The printable stand-ins of the 256 bytes, in CLIP's order."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _vocabulary(first: Iterable[str], merges: Merges) -> dict[str, int]:
    """Ids of the first tokens and of what the merges make, in order; ValueError for a bad merge."""
    vocab = {token: index for index, token in enumerate(first)}
    for left, right in merges:
        if left not in vocab or right not in vocab:
            raise ValueError(f'the merge "{left} {right}" joins unknown tokens')
        vocab.setdefault(left + right, len(vocab))
    return vocab


def clip_vocabulary() -> tuple[dict[str, int], Merges]:
    """CLIP's tokens with their ids, and the merges that make them."""
    with gzip.open(MERGES_FILE, "rt", encoding="utf-8") as file:
        merges = [_pair(line) for line in file.read().splitlines()]
    symbols = _symbols()
    vocab = _vocabulary([*symbols, *(s + "</w>" for s in symbols)], merges)
    for mark in (CLIP_START, CLIP_END):
        vocab[mark] = len(vocab)
    return vocab, merges


@cache
def _clip_backend() -> Backend:
    from tokenizers import AddedToken, Regex
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE
    from tokenizers.normalizers import NFC, Lowercase, Replace
    from tokenizers.normalizers import Sequence as Normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers

    vocab, merges = clip_vocabulary()
    backend = Backend(
        BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token=CLIP_END)
    )
    backend.normalizer = Normalizers([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
    backend.pre_tokenizer = PreTokenizers(
        [Split(Regex(CLIP_WORD), "removed", invert=True), ByteLevel(add_prefix_space=False)]
    )
    # CLIP reads its marks in a prompt's text as marks.
    backend.add_special_tokens(
        [AddedToken(mark, normalized=False, special=True) for mark in (CLIP_START, CLIP_END)]
    )
    return backend


def _with_learned_words(backend: Backend) -> Backend:
    """The same, splitting text as learned vocabularies do: nothing of it is lost but case and
    the amount of white space, and no text reads as a mark."""
    from tokenizers import Regex
    from tokenizers.normalizers import NFC, Lowercase, Prepend, Replace, Strip
    from tokenizers.normalizers import Sequence as Normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers

    backend.normalizer = Normalizers(
        [NFC(), Lowercase(), Replace(Regex(r"\s+"), " "), Strip(), Prepend(" ")]
    )
    backend.pre_tokenizer = PreTokenizers(
        [
            Split(Regex(LEARNED_WORD), "isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend
