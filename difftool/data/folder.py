"""Dataset folders in the layouts that other tools use, told apart by what is in them.

In this order: captions in metadata.jsonl, .csv or .parquet beside or above the pictures (Hugging
Face) or in kohya's JSON, a .txt or .caption beside a picture, folders named REPEATS_WORDS (kohya),
labels in dataset.json (EDM), one folder a class, and nothing, for unconditional training. A kohya
.toml names its folders itself. Whatever is found, assumed or left out is in the audit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from os.path import splitext
from pathlib import Path, PurePosixPath

from difftool.config.schema import DataConfig
from difftool.data import labels, tables
from difftool.data.archive import Files, Folders, open_files
from difftool.data.beside import describe_syntax, overlooked, sidecars
from difftool.data.captions import Caption, Syntax
from difftool.data.dataset import Audit, DataKind, OnProgress, SkippedFile
from difftool.data.kohya import metadata, repeats
from difftool.data.kohya.toml import TomlFolder, read_toml
from difftool.data.listing import Listing
from difftool.data.phrases import count, named
from difftool.data.pictures import (
    FEW,
    SHARE,
    Checked,
    FolderDataset,
    PictureRow,
    Pool,
    check,
    no_usable,
)
from difftool.errors import InputError, UsageError
from difftool.images.formats import SUFFIXES
from difftool.images.read import colour
from difftool.storage import runs

SPLITS = ("train", "validation", "valid", "val", "test")
"""Folders that are parts of a set, in the order of preference for what is held out."""
MASKS = ("-masklabel", "-condlabel")
"""How the names of OneTrainer's masks and conditioning pictures end."""
FOREIGN = frozenset(
    (".heic", ".heif", ".avif", ".jxl", ".psd", ".svg", ".tga", ".ico", ".jp2", ".exr", ".hdr")
)
"""Pictures that are not read; files of other kinds (notes, scripts) go unmentioned."""


def open_folder(
    where: Path,
    config: DataConfig | None = None,
    *,
    workers: int | None = None,
    progress: OnProgress | None = None,
) -> FolderDataset:
    """The dataset in a folder, .zip, .tar or kohya .toml, every picture read once to know that it
    can be. `workers`: threads that read pictures; None = as many as there are cores.

    UsageError if it is missing; InputError if it holds no usable picture, if more than a tenth (and
    more than three) of them are unusable, or without a caption that others have, unless allowed,
    and if captions cannot be read.
    """
    config = config or DataConfig()
    colour(config.background)
    if config.keep_tokens < 0:
        raise UsageError(f"{config.keep_tokens} tokens cannot be kept")
    pool = Pool(workers)
    if where.suffix.lower() == ".toml" and where.is_file():
        return _open_toml(where, config, pool, progress)
    files = open_files(where)
    audit = Audit(str(where), skipped=list(files.skipped))
    if not config.own_pictures:
        _leave_out_runs(files, audit)
    every = _pictures(files, audit)
    names, held, held_root = _splits(every, audit)
    checked = check(files, [*names, *held], audit, config, pool, progress)
    kept = [name for name in names if name in checked]
    if not kept:
        raise no_usable(audit)

    syntax = Syntax(config.wildcards, config.shuffle_captions, config.keep_tokens)
    if any(checked[name].own for name in kept):
        listing = Listing(files, kept, _root(kept), Audit(""), config)
        captions, tally = _captions(listing, syntax)
        kept = _without_own(kept, checked, {*captions, *tally.regular}, audit, config)
    listing = Listing(files, kept, _root(kept), audit, config)
    captions, tally = _captions(listing, syntax)
    repeats.balance(tally, listing)
    classes = {} if captions else labels.classes(listing)
    if not captions and config.labels == "text":
        raise InputError(f"{where} has no captions", hint="put a .txt beside each picture")
    overlooked(listing, every, bool(captions), refuse=True)
    kind: DataKind = "text" if captions else "class" if classes else "none"
    order = sorted(set(classes.values()), key=labels.natural)
    if kind == "text":
        describe_syntax(listing, captions, syntax)
    numbers = {name: order.index(label) for name, label in classes.items()}
    rows = _rows(kept, checked, captions, numbers, tally.repeats, syntax)
    _describe(audit, rows, kind, order)
    _check_uncaptioned(audit, config)
    dataset = FolderDataset(files, rows, kind, tuple(order), audit, config, pool)
    held = [name for name in held if name in checked]
    dataset.held_out = _held_out(dataset, held, held_root, checked)
    return dataset


def _rows(
    names: Sequence[str],
    checked: Mapping[str, Checked],
    captions: Mapping[str, Caption],
    classes: Mapping[str, int],
    repeats: Mapping[str, int],
    syntax: Syntax,
) -> list[PictureRow]:
    return [
        PictureRow(
            name,
            checked[name].content,
            checked[name].size,
            captions.get(name),
            classes.get(name),
            repeats.get(name, 1),
            syntax,
        )
        for name in names
    ]


# --- which pictures --------------------------------------------------------------------------


def _pictures(files: Files, audit: Audit) -> list[str]:
    """Names that look like pictures to train on."""
    suffixes = {name: splitext(name)[1].lower() for name in files.sizes}
    names = [name for name, suffix in suffixes.items() if suffix in SUFFIXES]
    masks = {name for name in names if splitext(name)[0].endswith(MASKS)}
    if masks:
        audit.notes.append(f"{count(len(masks), 'mask')} (-masklabel, -condlabel) ignored")
    foreign = (name for name, suffix in suffixes.items() if suffix in FOREIGN)
    audit.skipped += [SkippedFile(name, "unsupported format") for name in foreign]
    return sorted(set(names) - masks)


def _leave_out_runs(files: Files, audit: Audit) -> None:
    """Forget the files of run folders, whose pictures are samples and plots."""
    names = files.sizes
    paths = (PurePosixPath(name) for name in names if name.endswith(runs.CONFIG))
    found = {str(path.parent) for path in paths if path.name == runs.CONFIG}
    folders = sorted(
        f for f in found - {"."} if {f"{f}/{runs.METRICS}", f"{f}/{runs.FACTS}"} & names.keys()
    )
    if folders:
        below = tuple(f"{folder}/" for folder in folders)
        files.sizes = {n: size for n, size in names.items() if not n.startswith(below)}
        audit.notes.append(f"{count(len(folders), 'run folder')} left out: {named(folders)}")


def _without_own(
    names: Sequence[str],
    checked: Mapping[str, Checked],
    meant: Collection[str],
    audit: Audit,
    config: DataConfig,
) -> list[str]:
    """The pictures without those that difftool made, where there are others; those with captions,
    or for regularisation, are `meant` as data."""
    own = {name for name in names if checked[name].own and name not in meant}
    if not own or config.own_pictures or len(own) == len(names):
        return list(names)
    made = f"{count(len(own), 'picture')} that difftool made left out: {named(sorted(own))}"
    audit.notes.append(f"{made} (--set data.own_pictures=true: they are trained on)")
    return [name for name in names if name not in own]


def _splits(names: Sequence[str], audit: Audit) -> tuple[list[str], list[str], str]:
    """Pictures to train on and, where the set is laid out in splits, those to hold out and their
    folder."""
    root = _root(names)
    tops = {name: name.removeprefix(root).partition("/") for name in names}
    parts = {top for top, _, _ in tops.values()}
    if "train" not in parts or not parts <= set(SPLITS):
        return list(names), [], ""
    held = next((part for part in SPLITS[1:] if part in parts), None)
    if others := sorted(parts - {"train", held}):
        audit.notes.append(f"train/ is used, {', '.join(f'{part}/' for part in others)} left alone")
    return (
        [name for name, (top, _, _) in tops.items() if top == "train"],
        [name for name, (top, _, _) in tops.items() if top == held],
        f"{root}{held}/",
    )


def _root(names: Sequence[str]) -> str:
    """The folder below which folders mean something: train/, or a folder around all others."""
    root = ""
    while names:
        rest = [name.removeprefix(root).split("/") for name in names]
        top = rest[0][0]
        alone = all(len(parts) > 1 and parts[0] == top for parts in rest)
        if not alone or repeats.REPEATS.fullmatch(top):
            break
        if top not in SPLITS and not all(len(parts) > 2 for parts in rest):
            break
        root += f"{top}/"
    return root


def _held_out(
    dataset: FolderDataset, names: Sequence[str], root: str, checked: Mapping[str, Checked]
) -> FolderDataset | None:
    """The set's own held-out split, read in the same way."""
    if not names:
        return None
    audit = Audit(f"{dataset.audit.source}, {root}")
    listing = Listing(dataset.files, names, root, audit, dataset.config)
    syntax, config = dataset.rows[0].syntax, dataset.config
    captions, classes = {}, {}
    if dataset.kind == "text":
        captions, _ = _captions(listing, syntax)
    elif dataset.kind == "class":
        found = labels.classes(listing, dataset.classes)
        classes = {n: dataset.classes.index(c) for n, c in found.items() if c in dataset.classes}
        if strange := [name for name in names if name not in classes]:
            dataset.audit.notes.append(
                f"{count(len(strange), 'image')} held out of classes that are not trained on: "
                f"not used ({named(strange)})"
            )
        names = [name for name in names if name in classes]
        if not names:
            return None
    rows = _rows(names, checked, captions, classes, {}, syntax)
    _describe(audit, rows, dataset.kind, dataset.classes)
    dataset.audit.notes.append(f"{root} is held out for validation: {count(len(rows), 'image')}")
    return FolderDataset(
        dataset.files, rows, dataset.kind, dataset.classes, audit, config, dataset.pool
    )


# --- captions --------------------------------------------------------------------------------


def _captions(listing: Listing, syntax: Syntax) -> tuple[dict[str, Caption], repeats.Tally]:
    """Captions from metadata, else from files beside the pictures, else from kohya's folders; and
    what those say of repeats."""
    if listing.config.labels not in ("auto", "text"):
        return {}, repeats.Tally({}, [])
    found = tables.captions(listing)
    found |= sidecars(listing, syntax, found)
    return found, repeats.folders(listing, found)


def _check_uncaptioned(audit: Audit, config: DataConfig) -> None:
    bare = audit.captions.get("", 0)
    if not config.allow_uncaptioned and bare > FEW and bare > SHARE * audit.images:
        sources = ", ".join(f"{n} from {source}" for source, n in audit.captions.items() if source)
        raise InputError(
            f"{bare} of {audit.images} pictures in {audit.source} have no caption",
            f"the others have: {sources}",
            "add the captions, give --allow-uncaptioned to train on them all, "
            "or --labels none to use no captions",
        )


def _describe(
    audit: Audit, rows: Sequence[PictureRow], kind: DataKind, classes: Sequence[str]
) -> None:
    audit.images = len(rows)
    by_area = sorted((row.size for row in rows), key=lambda size: (size[0] * size[1], size))
    audit.sizes = (by_area[0], by_area[(len(rows) - 1) // 2], by_area[-1])
    if kind == "text":
        sources = Counter(row.caption.source if row.caption else "" for row in rows)
        audit.captions = dict(sorted(sources.items()))
    elif kind == "class":
        members = Counter(row.label for row in rows).values()
        span = f"{min(members)}" + (f" to {max(members)}" if min(members) < max(members) else "")
        audit.notes.insert(0, f"{len(classes)} classes of {span} images: {named(classes, 10)}")
    else:
        audit.notes.insert(0, "no captions and no classes: unconditional")


# --- TOML ------------------------------------------------------------------------------------


def _open_toml(
    path: Path, config: DataConfig, pool: Pool, progress: OnProgress | None
) -> FolderDataset:
    """The dataset that a kohya TOML file describes: its folders, each with its own rules."""
    plan = read_toml(path, config)
    if plan.random_crop:
        config = replace(config, crop="random")
    roots = {}
    for folder in plan.folders:
        name = folder.path.name or "images"
        while name in roots:
            name += "'"
        roots[name] = folder
    files = Folders({name: folder.path for name, folder in roots.items()})
    audit = Audit(str(path), skipped=list(files.skipped), notes=list(plan.notes))
    every = _pictures(files, audit)
    flat = [name for name in every if name.count("/") == 1]
    if len(flat) < len(every):
        deep = len(every) - len(flat)
        audit.notes.append(f"{count(deep, 'image')} in deeper folders not used, as kohya does")
    checked = check(files, flat, audit, config, pool, progress)
    whole = Listing(files, list(checked), "", audit, config)
    rows: list[PictureRow] = []
    captions: dict[str, Caption] = {}
    tally = repeats.Tally({}, [])
    for root, folder in roots.items():
        kept = [name for name in checked if name.startswith(f"{root}/")]
        listing = Listing(files, kept, f"{root}/", audit, config, whole.seen)
        found = _captions_of(listing, folder, path)
        meant = kept if folder.values.get("is_reg") else found
        kept = _without_own(kept, checked, meant, audit, config)
        captions |= found
        for name in kept:
            tally.repeats[name] = folder.repeats
        if folder.values.get("is_reg"):
            tally.regular += kept
        rows += _rows(kept, checked, found, {}, {}, folder.syntax)
        audit.notes.append(f'"{root}" x{folder.repeats}: {count(len(kept), "image")}')
        describe_syntax(listing, found, folder.syntax)
    repeats.balance(tally, whole)
    rows = [replace(row, repeats=tally.repeats[row.name]) for row in rows]
    if not any(row.repeats for row in rows):
        raise InputError(f"{path} repeats every picture 0 times")
    kind: DataKind = "text" if captions else "none"
    overlooked(whole, every, bool(captions))
    _describe(audit, rows, kind, ())
    _check_uncaptioned(audit, config)
    dataset = FolderDataset(files, rows, kind, (), audit, config, pool)
    dataset.asked = plan.asked
    if "size" in plan.asked:
        dataset.native_size = plan.asked["size"]
    return dataset


def _captions_of(listing: Listing, folder: TomlFolder, path: Path) -> dict[str, Caption]:
    """Captions of one subset: its metadata file, files beside the pictures, its class tokens."""
    if listing.config.labels not in ("auto", "text"):
        return {}
    found: dict[str, Caption] = {}
    if (name := folder.values.get("metadata_file")) is not None:
        where = path.parent / name
        where = where if where.is_file() else Path(name)
        found = metadata.read_file(listing, where)
    found |= sidecars(listing, folder.syntax, found, folder.suffixes)
    used = {caption.source for caption in found.values()} - {folder.suffixes[0]}
    if other := used & set(folder.suffixes):
        listing.note(f"no {folder.suffixes[0]} beside some pictures: {', '.join(other)} is read")
    if tokens := folder.values.get("class_tokens", "").strip():
        for picture in listing.pictures:
            found.setdefault(picture, Caption((tokens,), "class_tokens"))
    return found
