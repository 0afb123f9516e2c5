"""What the train step of `neighbors.py` costs before any neighbour list: its energy of bare vectors.

    python benchmarks/floor.py --threads 2

The vectors are a leaf here and the loss's gradient comes in for free, so times and bytes are torch's own, for
the energy sum of 1/sqrt(d² + 1), its gradient, and that gradient's backward. A list adds the search, its
indices, and the way to positions and cell. Of the bytes, 12 in float32 are the result, which a list gathers
into one row an atom; the rest no list can avoid.
"""

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch
from harness import peak_growth_mb, seconds


def bare_train_step(vectors: torch.Tensor):
    """The train step on a leaf of shape (P, 3), as a call."""
    upstream = vectors.new_ones(()).expand_as(vectors)

    def train():
        energy = (vectors.square().sum(-1) + 1).rsqrt().sum()
        (first,) = torch.autograd.grad(energy, vectors, create_graph=True)
        return torch.autograd.grad(first, vectors, upstream)

    return train


def leaf(num_pairs: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    return torch.rand(num_pairs, 3, dtype=dtype, device=device, requires_grad=True)


def milliseconds(num_pairs: int, dtype: torch.dtype) -> float:
    """Median over repeats."""
    call = bare_train_step(leaf(num_pairs, dtype))
    call()
    times = sorted(seconds(call, "cpu") for _ in range(200 if num_pairs < 10**5 else 7))
    return 1e3 * times[len(times) // 2]


def peak_bytes_a_pair(num_pairs: int, dtype: torch.dtype, threads: int) -> float:
    """The vectors included, as they are in the train step of a list."""
    torch.set_num_threads(threads)
    bare_train_step(leaf(1000, dtype))()
    return peak_growth_mb(lambda: bare_train_step(leaf(num_pairs, dtype))(), "cpu") * 2**20 / num_pairs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--pairs", default="5680,88474,945412,8643440", help="numbers of pairs")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    torch.set_num_threads(options.threads)

    print(f"{'pairs':>12} {'train ms':>10} {'bytes a pair':>14}")
    for num_pairs in map(int, options.pairs.split(",")):
        time = milliseconds(num_pairs, dtype)
        # As in peers.py: freed blocks go back at once, so that the peak is what was in use.
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            size = pool.submit(peak_bytes_a_pair, num_pairs, dtype, options.threads).result()
        print(f"{num_pairs:>12,} {time:>10.2f} {size:>14.1f}")


if __name__ == "__main__":
    main()
