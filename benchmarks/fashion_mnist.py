"""How good are class-conditional samples of Fashion-MNIST? Two numbers, from a small classifier.

    python benchmarks/fashion_mnist.py                              # check of the measure itself
    python benchmarks/fashion_mnist.py --samples out/               # out/<class>/*.png
    python benchmarks/fashion_mnist.py --samples out.jsonl          # from difftool sample --json
    python benchmarks/fashion_mnist.py --model runs/fashion --count 10000

1. Agreement: the share of samples that the classifier assigns to the class that was asked for.
2. FD: the Frechet distance between Gaussians fitted to the classifier's 128 penultimate features of
   the samples and of the 10,000 test images, in fp64; beside it that of 10,000 training images.

The classifier is trained once on the 60,000 training images and kept in --cache.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import FASHION, FASHION_CLASSES, fashion_mnist  # the script beside this one
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EPOCHS, BATCH, LR = 8, 128, 2e-3
FEATURES = 128


class Classifier(nn.Module):
    """A small convolutional network: [B,1,28,28] in [0, 1] to 128 features to 10 logits."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, kernel: int = 3) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.features = nn.Sequential(
            *block(1, 16, 5), nn.MaxPool2d(2),
            *block(16, 32), *block(32, 64), nn.MaxPool2d(2),
            *block(64, 128), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3),
            nn.Linear(128 * 9, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B,128] and logits [B,10]."""
        features = self.features(images)
        return features, self.head(features)


def tensors(images: np.ndarray) -> Tensor:
    """uint8 [N,28,28] as fp32 [N,1,28,28] in [0, 1]."""
    return torch.from_numpy(images.copy())[:, None].float() / 255


def train(images: Tensor, labels: Tensor) -> Classifier:
    """Adam, one cycle of the learning rate, mirrored images; deterministic given the threads."""
    torch.manual_seed(0)
    model = Classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=1e-2)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.2)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images))
        start, right = time.perf_counter(), 0
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            batch = images[chosen]
            mirrored = torch.rand(len(batch)) < 0.5
            batch[mirrored] = batch[mirrored].flip(-1)
            _, logits = model(batch)
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += int((logits.argmax(1) == labels[chosen]).sum())
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: {right / len(images):.4f} right, {seconds:.0f} s", flush=True)
    return model.eval()


def classifier(cache: Path, source: Path) -> Classifier:
    """The trained classifier, from the cache if it is there."""
    model = Classifier().eval()
    if cache.exists():
        model.load_state_dict(load_file(cache))
        return model
    images, labels = fashion_mnist("train", source)
    model = train(tensors(images), torch.from_numpy(labels.astype(np.int64)))
    cache.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), cache)
    return model


@torch.no_grad()
def run(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N,128] in fp64 and predicted labels [N]."""
    parts = [model(batch) for batch in images.split(500)]
    return torch.cat([f for f, _ in parts]).double(), torch.cat([p.argmax(1) for _, p in parts])


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features [N,D]: Dowson, Landau 1982.

    tr sqrt(A B) is taken from the eigenvalues of sqrt(A) B sqrt(A), which is symmetric.
    """
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(means + cov_a.trace() + cov_b.trace() - 2 * cross))


# --- samples ---------------------------------------------------------------------------------


def prepare(image: Image.Image) -> Tensor:
    """A sample of any size and colour as the classifier wants it, [1,28,28] in [0, 1]."""
    grey = np.asarray(image.convert("RGB"), np.float32).mean(2)
    if grey.shape != (28, 28):
        grey = np.asarray(Image.fromarray(grey).resize((28, 28), Image.Resampling.LANCZOS))
    return torch.from_numpy(grey / 255).clamp(0, 1)[None]


def label_of(name: Any) -> int:
    """The label of a class's name, or of its number in Fashion-MNIST's own order."""
    if name in FASHION_CLASSES:
        return FASHION_CLASSES.index(name)
    return int(name)


def samples(where: Path) -> tuple[Tensor, Tensor]:
    """Images and asked labels of <where>/<class>/*.png, or of JSON lines with path and label."""
    if where.is_dir():
        rows = [(p, label_of(p.parent.name)) for p in sorted(where.glob("*/*.png"))]
    else:
        entries = [json.loads(line) for line in where.read_text(encoding="utf-8").splitlines()]
        rows = [(Path(e["path"]), label_of(e["label"])) for e in entries if "path" in e]
    if not rows:
        raise SystemExit(f"{where} has no samples")
    images = torch.stack([prepare(Image.open(path)) for path, _ in rows])
    return images, torch.tensor([label for _, label in rows])


def generate(where: str, count: int, batch: int, **changes: Any) -> tuple[Tensor, Tensor]:
    """Samples of a model, the classes in turn, seeds 0 .. count - 1."""
    from difftool.images.fit import to_pil
    from difftool.pipeline.decode import decode
    from difftool.pipeline.generate import generate as sampled
    from difftool.pipeline.inputs import SampleInput
    from difftool.pipeline.load import load_model
    from difftool.pipeline.settings import plan_sampling, resolve_settings

    model = load_model(where, device="auto")
    names = model.preset.classes
    settings = resolve_settings(model, changes)
    plan = plan_sampling(model, settings)
    print(f"{settings.steps} steps of {settings.sampler}, guidance {settings.guidance:g}")

    def pictures() -> Iterator[Tensor]:
        start = time.perf_counter()
        for first in range(0, count, batch):
            seeds = range(first, min(first + batch, count))
            items = [SampleInput(label=seed % len(names), seed=seed) for seed in seeds]
            *_, last = sampled(plan, items)
            yield from (prepare(to_pil(image)) for image in decode(model, last.x).cpu())
            done, seconds = seeds[-1] + 1, time.perf_counter() - start
            print(f"\r{done} of {count}, {done / seconds:.1f}/s", end="", flush=True)
        print()

    images = torch.stack(list(pictures()))
    return images, torch.tensor([label_of(names[seed % len(names)]) for seed in range(count)])


# --- report ----------------------------------------------------------------------------------


def report(predicted: Tensor, asked: Tensor) -> dict[str, Any]:
    """Agreement over all samples and by class, with its standard error."""
    right = (predicted == asked).float()
    share = float(right.mean())
    classes = {
        name: round(float(right[asked == label].mean()), 4)
        for label, name in enumerate(FASHION_CLASSES)
        if bool((asked == label).any())
    }
    error = math.sqrt(share * (1 - share) / len(right))
    return {"agreement": round(share, 4), "error": round(error, 4), "by_class": classes}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--samples", type=Path, help="folder of class folders, or JSON lines")
    parser.add_argument("--model", help="a model to draw samples from")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--sampler")
    parser.add_argument("--source", type=Path, default=FASHION, help="folder of the idx files")
    parser.add_argument("--cache", type=Path, default=Path("runs/fashion-classifier.safetensors"))
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    model = classifier(options.cache, options.source)
    test_images, test_numbers = fashion_mnist("test", options.source)
    test_labels = torch.from_numpy(test_numbers.astype(np.int64))
    test_features, test_predicted = run(model, tensors(test_images))
    train_images, _ = fashion_mnist("train", options.source)
    some = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0))[:10_000]
    train_features, _ = run(model, tensors(train_images[some.numpy()]))
    result: dict[str, Any] = {
        "test_accuracy": report(test_predicted, test_labels)["agreement"],
        "fd_train": round(frechet(train_features, test_features), 3),
    }
    if options.samples or options.model:
        if options.samples:
            images, asked = samples(options.samples)
        else:
            settings = {k: getattr(options, k) for k in ("steps", "guidance", "sampler")}
            images, asked = generate(options.model, options.count, options.batch, **settings)
        features, predicted = run(model, images)
        result |= {"samples": len(images), **report(predicted, asked)}
        result["fd"] = round(frechet(features, test_features), 3)
    else:  # the measure is measured: what must be near chance, and what must be far away
        generator = torch.Generator().manual_seed(1)
        shuffled = test_labels[torch.randperm(len(test_labels), generator=generator)]
        noise_features, _ = run(model, torch.rand(10_000, 1, 28, 28, generator=generator))
        blurred = F.avg_pool2d(tensors(test_images), 3, 1, 1)
        blurred_features, blurred_predicted = run(model, blurred)
        result |= {
            "by_class": report(test_predicted, test_labels)["by_class"],
            "shuffled_labels": report(test_predicted, shuffled)["agreement"],
            "blurred": report(blurred_predicted, test_labels)["agreement"],
            "fd_blurred": round(frechet(blurred_features, test_features), 3),
            "fd_noise": round(frechet(noise_features, test_features), 3),
            "fd_same": round(frechet(test_features, test_features), 6),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
