"""Balanced k-means at the sizes of a large FFN, on rows without structure and on a mixture of clusters.

python bench/partition.py [--f 16384 --d 2048 --experts 512 4096] [--data random mixture] [--seed 0]
"""

import time

import command
import torch
from sadmoe.partition import inertia, partition
from sadmoe.timing import machine
from torch import Tensor


def random(f: int, d: int, g: torch.Generator) -> Tensor:
    return torch.randn(f, d, generator=g)


def mixture(f: int, d: int, g: torch.Generator) -> Tensor:
    """64 clusters of very unequal sizes: equal experts must cut the large ones and join the small ones."""
    sizes = torch.randn(64, generator=g).exp()
    cluster = torch.multinomial(sizes, f, replacement=True, generator=g)
    return torch.randn(64, d, generator=g)[cluster] + 0.7 * torch.randn(f, d, generator=g)


DATA = {"random": random, "mixture": mixture}


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--f", type=int, default=16384, help="neurons")
    parser.add_argument("--d", type=int, default=2048, help="width of a row")
    parser.add_argument("--experts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"# {machine()}")
    for name in args.data:
        weights = DATA[name](args.f, args.d, torch.Generator().manual_seed(args.seed))
        for experts in args.experts:
            start, start_cpu = time.perf_counter(), time.process_time()
            labels = partition(weights, experts, seed=args.seed, progress=True)
            seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            row = f"{name:8} f={args.f} d={args.d} E={experts:<5} {seconds:7.1f} s (CPU {cpu:.1f} s)"
            print(f"{row}   inertia {inertia(weights, labels):.1f}", flush=True)


if __name__ == "__main__":
    main()
