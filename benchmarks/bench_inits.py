"""Fast PiSSA on one weight against the whole decomposition, and against PEFT's fast PiSSA.

A weight of each spectrum: a random matrix, whose values fall off so slowly that no search is harder, and one that falls
off like a trained weight. For each rank the seconds of ``leading_svd`` are compared with ``torch.linalg.svd`` and with
``torch.svd_lowrank`` as PEFT's ``pissa_niter_16`` calls it; ``--model`` takes a weight from a real model instead. The
errors are sines of the largest angle to the subspace of a float64 decomposition. Peers take turns.

    python benchmarks/bench_inits.py --size 4096 --ranks 16 64 128
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import RESULTS, Results, ratio_of_medians
from torch import Tensor

from veneer.kernels.svd import full_svd, leading_svd


def main() -> None:
    """Measure times and errors, and save the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--repeats", type=int, default=3, help="turns of each peer")
    parser.add_argument("--model", type=Path, help="a safetensors file; its largest matrix is measured too")
    parser.add_argument("--tiny", action="store_true", help="a size that takes seconds; saves only with --results")
    parser.add_argument("--results", type=Path, help="the CSV file to append to")
    options = parser.parse_args()
    if options.results is None and not options.tiny:
        options.results = RESULTS
    if options.tiny:
        options.size, options.ranks = 520, options.ranks[:1]
    results = Results("inits", options.results)
    for name, W in weights(options.size, options.model).items():
        exact = torch.linalg.svd(W.double(), full_matrices=False)
        for r in options.ranks:
            case = f"{name} {W.shape[0]}x{W.shape[1]} r={r}"
            found, seconds = in_turn(
                {
                    "veneer": lambda W=W, r=r: leading_svd(W, r)[:3],
                    "torch.linalg.svd": lambda W=W, r=r: full_svd(W, r)[:3],
                    "pissa_niter_16": lambda W=W, r=r: as_triplets(*torch.svd_lowrank(W, r, niter=16)),
                },
                options.repeats,
            )
            ours = seconds["veneer"]
            errors = {peer: sine(exact[0][:, :r], triplets[0]) for peer, triplets in found.items()}
            for peer in list(found)[1:]:
                theirs = seconds[peer]
                results.add(
                    f"{case} / {peer}",
                    "seconds",
                    statistics.median(ours),
                    statistics.median(theirs),
                    ratio_of_medians(ours, theirs),
                    "s",
                )
                ratio = errors["veneer"] / errors[peer] if errors[peer] else None
                results.add(f"{case} / {peer}", "subspace error", errors["veneer"], errors[peer], ratio, "sine")
    results.save()


def weights(size: int, model: Path | None) -> dict[str, Tensor]:
    """The matrices to measure, by what they are."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(size, size, generator=generator)
    found = {"random": flat, "decaying": flat / torch.arange(1, size + 1) ** 0.5}
    if model is not None:
        from safetensors import safe_open

        with safe_open(model, framework="pt") as file:
            sizes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a mapping
            square = {key: min(shape) for key, shape in sizes.items() if len(shape) == 2}
            key = max(square, key=lambda key: square[key])
            found[key] = file.get_tensor(key).float()
    return found


def in_turn(
    peers: dict[str, Callable[[], tuple[Tensor, ...]]], repeats: int
) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, list[float]]]:
    """What each peer gives, and its seconds in every turn."""
    found: dict[str, tuple[Tensor, ...]] = {}
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    for _ in range(repeats):
        for peer, run in peers.items():
            start = time.perf_counter()
            found[peer] = run()
            seconds[peer].append(time.perf_counter() - start)
    return found, seconds


def as_triplets(U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.svd_lowrank``'s answer in the order of ``torch.linalg.svd``'s."""
    return U, S, V.t()


def sine(expected: Tensor, found: Tensor) -> float:
    """Of the largest angle between the spans of two sets of orthonormal columns."""
    found = found.double()
    return float(torch.linalg.matrix_norm(found - expected @ (expected.t() @ found), 2))


if __name__ == "__main__":
    main()
