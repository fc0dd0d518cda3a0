"""One start of a recipe: what its command line asks for, how long that takes, and where its time went."""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from sadmoe import Checkpoint
from sadmoe.files import replacing


@dataclass(frozen=True)
class Effort:
    """How long a recipe takes. Seconds are of training."""

    task: float  # the dense model on its task
    projections: int  # updates of each MLP of attention; 0: attention stays as it is
    sparsify: float  # 0: the activations stay as they are
    layers: float
    routers: int  # updates of each router
    routed: float
    tokens: int  # of each layer, for routers and layers
    stride: int  # they come from every stride-th batch of the training data
    train: int  # samples
    tests: int  # samples at most, and as many to pick a setting on
    timed: float  # seconds of timing at each point
    share: float = 0.2  # of the experts, at which the penalty on their norms rests
    budget: float = 0.4  # FLOPs of the converted layers, for the tau at which the routed fine-tune runs
    taus: tuple[float, ...] = (0.0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55)
    # Of the experts, for static top-k.
    shares: tuple[float, ...] = (0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
    pruned: tuple[float, ...] = ()  # of the neurons, each a model of its own, trained for as long as ours

    def training(self, sizes: int) -> float:
        """Seconds of training alone, for so many expert sizes, a static k, pruned models, and MoEfication where it is
        fine-tuned."""
        tuned = sizes + len(self.pruned) + (not self.sparsify)
        return self.task + self.sparsify + tuned * (self.layers + self.routed) + self.routed

    def longer(self, factor: float) -> "Effort":
        """The same work with that many times the seconds of training."""
        names = ("task", "sparsify", "layers", "routed")
        return replace(self, **{name: factor * getattr(self, name) for name in names})


TINY = Effort(1, 3, 1, 1, 5, 0.5, 500, 1, 64, 32, 0.05, taus=(0.0, 0.1, 1.0), shares=(0.5, 0.1))
CPU = Effort(120, 400, 200, 80, 500, 130, 20_000, 4, 12_000, 2_000, 1.5)
GPU = Effort(600, 3000, 1800, 900, 3000, 1200, 200_000, 1, 60_000, 10_000, 3)


@dataclass
class Run:
    """name: of its files and its state, such as w1-cpu or w1-cpu-x2.5.   sizes: neurons in an expert, ours first.
    seed: of all that is random, but for the order of the data.   untrained: nothing is fine-tuned but routers.
    bf16: dense and ours in bfloat16 are measured, too.
    seconds: by stage that came to its end, of this start and those before it."""

    name: str
    effort: Effort
    data: Path
    out: Path
    sizes: Sequence[int]
    device: str
    seed: int = 0
    untrained: bool = False
    bf16: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.state.mkdir(parents=True, exist_ok=True)  # or an error, before anything is trained
        if self.clock.exists():
            self.seconds = json.loads(self.clock.read_text())

    @property
    def state(self) -> Path:
        """The folder of what a start leaves for the next one."""
        return self.out / "state" / self.name

    def file(self, kind: str) -> Path:
        """The result of that kind: json, png or html."""
        return self.out / f"{self.name}.{kind}"

    @property
    def clock(self) -> Path:
        """The seconds of earlier starts."""
        return self.state / "seconds.json"

    def checkpoint(self, step: str) -> Checkpoint:
        """Where a step saves itself, to be taken up again after a kill."""
        return Checkpoint(self.state / step, every=30)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Says when a stage begins and ends, and notes how long it took."""
        began = time.perf_counter()
        print(f"[{began - self.started:5.0f} s] {name}", flush=True)
        yield
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - began
        with replacing(self.clock) as beside:
            beside.write_text(json.dumps(self.seconds))
        print(f"[{now - self.started:5.0f} s] {name}: took {now - began:.0f} s", flush=True)


def from_command_line(
    name: str,
    description: str,
    efforts: Mapping[str, Effort],
    sizes: Sequence[int] = (8, 32),
    effort: str = "cpu",
) -> Run:
    """What every recipe's command line takes. sizes, effort: by default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="folder that fetch.sh filled (%(default)s)")
    add("--out", type=Path, default=Path("runs"), help="folder for results (%(default)s)")
    add("--effort", choices=efforts, default=effort, help="how long it takes, and what of it (%(default)s)")
    add("--longer", type=float, default=1.0, help="times the seconds of training, for a slow machine")
    add("--sizes", type=int, nargs="+", default=sizes, help="neurons in an expert; the first is ours")
    add("--untrained", action="store_true", help="only what has nothing fine-tuned but routers")
    add("--bf16", action="store_true", help="dense and ours in bfloat16, too, beside dense in float32")
    add("--pruned", type=float, nargs="+", default=(), help="shares of the neurons to prune to, beside ours")
    add("--seed", type=int, default=0, help="of all that is random (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if not args.longer > 0:
        parser.error(f"argument --longer: expected a number above 0, got {args.longer:g}; try 2")
    if min(args.sizes) < 1 or len(set(args.sizes)) < len(args.sizes):
        parser.error(f"argument --sizes: expected different numbers above 0, got {args.sizes}; try 8 32")
    if args.bf16 and args.untrained:
        parser.error("argument --bf16: is of models that were fine-tuned; leave out --untrained")
    if args.pruned and args.untrained:
        parser.error("argument --pruned: is of models that were fine-tuned; leave out --untrained")
    if not all(0 < share < 1 for share in args.pruned):
        parser.error(f"argument --pruned: expected numbers between 0 and 1, got {args.pruned}; try 0.3 0.2")
    torch.set_num_threads(args.threads)
    asked = replace(efforts[args.effort].longer(args.longer), pruned=tuple(args.pruned))
    seconds = asked.task if args.untrained else asked.training(len(args.sizes))
    print(f"{name}, effort {args.effort}: {seconds:.0f} s of training, and its measurements")
    longer = "" if args.longer == 1 else f"-x{args.longer:g}"
    again = "" if args.seed == 0 else f"-seed{args.seed}"
    untrained = "-untrained" if args.untrained else ""
    return Run(
        f"{name}-{args.effort}{longer}{untrained}{again}", asked, args.data, args.out, args.sizes, args.device,
        args.seed, args.untrained, args.bf16,
    )  # fmt: skip
