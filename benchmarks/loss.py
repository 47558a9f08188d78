"""The chunked loss beside its peers: time, and peak memory above the inputs.

Run it from the repository:

    python benchmarks/loss.py             # the whole table, about ten minutes on one core
    python benchmarks/loss.py --quick     # one small shape, a few seconds

``ours`` is what a training step runs; ``ours, logged`` is a step that is logged, which measures the
distances to both teachers as well. Peers, all given the same float32 hidden states and heads,
forward and backward:

* ``materialised``: the same reverse KL by log_softmax and autograd, logits in full;
* ``released``: the formula of the paper's released code (forward KL, normalised over dim 1, batch
  row 0 only), logits in full; it computes something else and is here for its cost;
* ``trl``: TRL's chunked distillation loss, fed with the joined teacher [(1−λ)·h_ref, λ·h_al] and
  [W_ref, W_al], which makes it the same reverse KL. The joined weight is made beforehand and not
  counted. Its tiles are sized for GPUs; what is measured here is the CPU.

Every shape runs in a process of its own, methods take turns, and a figure is the median of its
runs. Time is CPU time, which other work on the machine disturbs least. Memory is the growth of the
resident set, by the kernel's high-water mark; gradients count, inputs do not.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from _machine import MIB, peak_growth, resident, work_seconds
from torch import Tensor

from flexalign.fusion import concatenate_hidden, fuse
from flexalign.losses import fused_divergence

LAM = 2.0
FULL = [
    # T, V, H, runs of each method
    (1024, 49152, 576, 3),
    (2048, 49152, 576, 1),
    (4096, 49152, 576, 3),
    (8192, 49152, 576, 1),
    (1024, 49152, 1536, 1),
    (1024, 151936, 576, 1),
    (1024, 151936, 1536, 1),
]
QUICK = [(1024, 8192, 256, 3)]
RESULTS = Path(__file__).parent / "results" / "loss.md"
SHARE_OF_MEMORY = 0.7
"""Of what is free: more than that is not fitting, before the system starts to kill processes."""


class Inputs:
    """Hidden states and heads of a student and two teachers."""

    def __init__(
        self, T: int, V: int, H: int, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.hidden = [torch.randn(1, T, H, **made) for _ in range(3)]
        self.heads = [torch.randn(V, H, **made) / H**0.5 for _ in range(3)]
        self.mask = torch.ones(1, T, dtype=torch.bool, device=device)
        self.joined_head = torch.cat([self.heads[1], self.heads[2]], dim=1)
        self.leaves = (self.hidden[0].requires_grad_(), self.heads[0].requires_grad_())


def ours(x: Inputs) -> Tensor:
    return fused_divergence(*sides(x), x.mask, LAM)


def ours_logged(x: Inputs) -> Tensor:
    loss, _ = fused_divergence(*sides(x), x.mask, LAM, metrics=True)
    return loss


def sides(x: Inputs) -> list[Tensor]:
    return [part for side in zip(x.hidden, x.heads, strict=True) for part in side]


def teacher_logits(x: Inputs) -> Tensor:
    with torch.no_grad():
        sides = ((x.hidden[side] @ x.heads[side].mT).float() for side in (1, 2))
        return fuse(*sides, LAM)


def materialised(x: Inputs) -> Tensor:
    log_t = teacher_logits(x).log_softmax(-1)
    log_s = (x.hidden[0] @ x.heads[0].mT).float().log_softmax(-1)
    return (log_s.exp() * (log_s - log_t)).sum(-1).mean()


def released(x: Inputs) -> Tensor:
    t = teacher_logits(x).softmax(1)
    log_s = (x.hidden[0] @ x.heads[0].mT).log_softmax(1)
    return torch.nn.functional.kl_div(log_s[0], t[0], reduction="batchmean")


def trl(x: Inputs) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    joined = concatenate_hidden(x.hidden[1][0], x.hidden[2][0], LAM)
    divergence, _ = ChunkedDivergenceFunction.apply(
        x.hidden[0][0], x.heads[0], None, joined, x.joined_head, None, 1.0
    )
    return divergence.mean()


def liger(x: Inputs) -> Tensor:
    """Liger's kernel in Triton, which needs a GPU; β = 1 is the reverse KL."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    joined = concatenate_hidden(x.hidden[1][0], x.hidden[2][0], LAM)
    labels = torch.zeros(len(joined), dtype=torch.long, device=joined.device)
    kernel = LigerFusedLinearJSD(jsd_beta=1.0)
    loss: Tensor = kernel(x.hidden[0][0], x.heads[0], joined, x.joined_head, labels)
    return loss


def liger_chunked(x: Inputs) -> Tensor:
    """Liger's loss over chunks, compiled by torch on a GPU; β = 1 is the reverse KL."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    joined = concatenate_hidden(x.hidden[1][0], x.hidden[2][0], LAM)
    labels = torch.zeros(len(joined), dtype=torch.long, device=joined.device)
    kernel = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=joined.is_cuda
    )
    loss: Tensor = kernel(x.hidden[0][0], x.heads[0], joined, x.joined_head, labels)
    return loss


METHODS = {
    "ours": ours,
    "ours, logged": ours_logged,
    "materialised": materialised,
    "released": released,
    "trl": trl,
}
ON_A_GPU = {
    **{name: METHODS[name] for name in ("ours", "ours, logged", "materialised", "trl")},
    "liger": liger,
    "liger, chunked": liger_chunked,
}
"""What `benchmarks/gpu.py` measures, where the packages are installed."""


def available() -> int:
    return int(psutil.virtual_memory().available)


def measure(method: Callable[[Inputs], Tensor], x: Inputs, device: str = "cpu") -> dict[str, float]:
    """One run: seconds of work, MiB above what was there before, the loss."""
    for leaf in x.leaves:
        leaf.grad = None
    with peak_growth(device) as grown:
        start = work_seconds(device)
        loss = method(x)
        loss.backward()
        seconds = work_seconds(device) - start
    return {"seconds": seconds, "mib": grown["mib"], "loss": float(loss.detach())}


def run_shape(T: int, V: int, H: int, runs: int, names: list[str]) -> dict[str, dict[str, float]]:
    """Let the methods take turns at one shape; those that do not fit are left out."""
    small = Inputs(8, 64, 16)
    for name in names:  # what is loaded or set up once is no part of a run
        METHODS[name](small)
    x = Inputs(T, V, H)
    room = int(SHARE_OF_MEMORY * available())
    limit = resident("VmSize") + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(runs):
        for name in list(found):
            try:
                found[name].append(measure(METHODS[name], x))
            except (RuntimeError, MemoryError) as error:
                if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
                    raise
                del found[name]
    return {"room": {"mib": room / MIB}} | {
        name: {key: statistics.median(run[key] for run in runs_) for key in runs_[0]}
        for name, runs_ in found.items()
    }


def in_own_process(shape: tuple[int, ...], options: list[str]) -> dict[str, dict[str, float]]:
    command = [sys.executable, __file__, "--shape", json.dumps(shape), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, dict[str, float]] = json.loads(done.stdout)
    return result


def table(shapes: list[tuple[int, ...]], names: list[str], threads: int) -> str:
    lines = [
        "| T | V | H | runs | method | CPU seconds | peak extra MiB | time, ours = 1 | memory, ours = 1 |",
        "|--:|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    print("\n".join(lines), flush=True)
    for shape in shapes:
        found = in_own_process(shape, ["--threads", str(threads), "--methods", *names])
        base = found["ours"]
        for name in names:
            row = "| " + " | ".join(str(part) for part in shape) + f" | {name} | "
            if name not in found:
                row += f"does not fit | > {found['room']['mib']:.0f} | | |"
            else:
                one = found[name]
                row += (
                    f"{one['seconds']:.2f} | {one['mib']:.0f} | "
                    f"{one['seconds'] / base['seconds']:.2f} | {one['mib'] / base['mib']:.2f} |"
                )
                if name in ("ours, logged", "materialised", "trl"):
                    assert abs(one["loss"] / base["loss"] - 1) < 1e-4, (name, one, base)
            print(row, flush=True)
            lines.append(row)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small shape, nothing written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--shape", type=json.loads, help="[T, V, H, runs]; prints JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.shape:
        print(json.dumps(run_shape(*arguments.shape, arguments.methods)))
        return
    shapes = QUICK if arguments.quick else FULL
    text = table(shapes, arguments.methods, arguments.threads)
    if arguments.quick:
        return
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        "# The chunked loss beside its peers\n\n"
        f"`python benchmarks/loss.py`, torch {torch.__version__}, {platform.machine()}, "
        f"{arguments.threads} thread, {available() / 2**30:.0f} GiB free. Forward and backward, "
        "float32, λ = 2, reverse KL, chunks of 256 tokens.\n\n" + text + "\n"
    )


if __name__ == "__main__":
    main()
