"""Time and memory of detection by the certified solver, by full SVDs, and by PEFT's own function: one table, one run.

    python tools/bench_detect.py                                          2048x2048, certified against dense
    python tools/bench_detect.py --shapes 4096x4096 --solvers certified,dense,peft
    python tools/bench_detect.py --shapes 2048x2048 --spectrum flat       no decay: the hardest case for Krylov
    python tools/bench_detect.py --topk-peers                             the leading triplets alone, against scipy and torch
    python tools/bench_detect.py --block                                  every linear layer of a Llama-3-8B block, times 32
    python tools/bench_detect.py --shapes 8192x28672 --dtype bf16 --solvers certified,blocks   memory: with an upcast copy, and without
    python tools/bench_detect.py --shapes 96x64 --json                    tiny: does it work?

Job. What is timed is the whole of it on one matrix: upcast, decisions on the --top-k leading directions, mitigation at
λ = 0.75, back-projection to the adapter's rank. `blocks` is the certified solver without a copy of the matrix in float32: it is
upcast a few rows at a time, in each product, as --max-memory makes `streamer detect` do. `peft` is
peft.tuners.lora.intruders.reduce_intruder_dimension on a model of one nn.Linear with the same weight and adapter; it needs peft.

Matrices. `power`: 64 singular values j^-0.7 over a bulk of Gaussian noise whose largest singular value is half of the last of
them, as trained weights have; `outlier`: the same with the first one 300 times as large; `flat`: noise alone, largest singular
value about 1. The adapter holds four planted intruders, of singular values well apart from the top part's (above the noise
for `flat`), and a small random rest.

Time. The solvers take turns, --repeats times, so that a busy machine slows all of them (those of --topk-peers do not); medians are
reported, of the wall's seconds and of the processor's (all threads). On a shared machine only the latter, with --threads 1, repeat. A
solver whose first run takes more than 5 s is run once, between runs of the certified one. The first run of each is watched for
memory (`RssAnon:` of /proc/self/status, growth over what the process held before) and is timed only if it is slow.

Model of cost. `cost` in streamer/detection/solvers.py is fitted to this tool with --dtype bf16 (Intel Xeon with AVX-512, `power`,
k = 10): upcast and certified decisions. The last two shapes need the proof of full rank. For the dense solver, the error is at most a
factor of two up to 8192x8192. On an AMD EPYC, four of these shapes, relative to 1448x1448, took 0.6 to 1.1 times `cost` with AVX-512
kernels and 0.9 to 1.3 times with AVX2 kernels.

    shape        measured (s)  `cost`
    640x640              0.11    0.13
    768x768              0.14    0.14
    1024x1024            0.15    0.15
    2048x2048            0.21    0.21
    1024x8192            0.30    0.29
    4096x4096            0.53    0.46
    14336x4096           1.47    1.30
    4096x14336           1.23    1.30
    8192x8192            1.62    1.47
    8192x28672            4.9     4.8
    2048x768             0.20    0.22
    4096x2048            0.81    0.71

`cheaper`: dense costs 0.6 times certified at 448x448, 0.9 at 576x576, 1.3 at 640x640, 1.8 at 768x768, 1.0 at 2048x512, 1.5 at 2560x640
and 5 at 640x2560.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from make_checkpoint import power_law
from measure import kilobytes, machine
from torch import Tensor

from streamer.detection.intruders import Detection, decide
from streamer.detection.options import DetectionOptions
from streamer.detection.solvers import triplets_columns
from streamer.linalg.operators import Dense, LowRank, RowBlocks, Sum
from streamer.linalg.svd import krylov_triplets, residuals
from streamer.linalg.torch_state import empty_matrix
from streamer.methods import Paper
from streamer.output.factors import back_project

SLOW = 5.0
TOP = 64
SCALE = 2.0
LAYERS = 32
BLOCK = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
PLANTED = {
    "power": (1.4, 0.8, 0.53, 0.42),
    "outlier": (1.4, 0.8, 0.53, 0.42),
    "flat": (2.2, 1.9, 1.6, 1.4),
}


class Case(NamedTuple):
    """A weight in the checkpoint's dtype, and the adapter's factors in float32; ``Δ = 2·B·A``."""

    weight: Tensor
    A: Tensor
    B: Tensor

    @property
    def delta(self) -> LowRank:
        """Δ in factors."""
        return LowRank(SCALE * self.B, self.A.T)


def make_case(
    shape: tuple[int, int], spectrum: str, rank: int, dtype: torch.dtype, seed: int, device: str
) -> Case:
    """A base of this spectrum and an adapter with planted intruders, the same for the same arguments."""
    m, n = shape
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=g)
    if spectrum == "flat":
        weight /= m**0.5 + n**0.5
    else:
        weight *= 0.5 * TOP**-0.7 / (m**0.5 + n**0.5) if min(m, n) > TOP else 0.0
        top = power_law(shape, g, top=TOP)
        if spectrum == "outlier":
            top.L[:, 0] *= 300
        weight.addmm_(top.L, top.R.T)
    A = torch.randn(rank, n, generator=g) / n**0.5
    B = 0.05 * torch.randn(m, rank, generator=g) / m**0.5
    for j, sigma in enumerate(PLANTED[spectrum][:rank]):
        u = torch.randn(m, generator=g)
        B[:, j] = u / u.norm() * sigma / SCALE / A[j].norm()
    return Case(weight.to(device, dtype), A.to(device), B.to(device))


def row_blocks(weight: Tensor) -> RowBlocks:
    """The weight, upcast a few rows at a time."""
    m, n = weight.shape
    return RowBlocks((m, n), lambda i, j: weight[i:j], torch.empty(0, device=weight.device))


def upcast(weight: Tensor) -> Dense:
    """The weight in float32, in memory as a run has it."""
    return Dense(
        empty_matrix((weight.shape[0], weight.shape[1]), torch.float32, weight.device).copy_(weight)
    )


def run_ours(case: Case, solver: str, k: int, epsilon: float) -> Detection:
    """Detection, mitigation and back-projection with one of the package's solvers."""
    base = row_blocks(case.weight) if solver == "blocks" else upcast(case.weight)
    options = DetectionOptions(k, epsilon, "certified" if solver == "blocks" else solver)
    found = decide(base, case.delta, options, name="bench").detection
    mitigated = Paper(0.75).mitigated(
        LowRank(*(t.cpu() for t in (case.delta.L, case.delta.R))), found
    )
    back_project(mitigated, case.A.shape[0], SCALE)
    return found


def peft_model(case: Case) -> Any:
    """A PEFT model of one linear layer with this weight and adapter."""
    from peft import LoraConfig, get_peft_model

    m, n = case.weight.shape
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(n, m, bias=False))
    model[0].weight = torch.nn.Parameter(case.weight, requires_grad=False)
    rank = case.A.shape[0]
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data = case.A.clone()
    layer.lora_B["default"].weight.data = case.B.clone()
    return model


def run_peft(case: Case, k: int, epsilon: float) -> int:
    """The number of intruders that PEFT's function finds."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    lines: list[str] = []
    reduce_intruder_dimension(
        peft_model(case), top_k=k, threshold_epsilon=epsilon, logging_sink=lines.append
    )
    return sum(int(line.rpartition(":")[2]) for line in lines if "Intruders: " in line)


class Run(NamedTuple):
    """One run: its result, wall and processor seconds, and growth of anonymous memory in bytes where it was watched."""

    result: Any
    seconds: float
    cpu: float
    memory: int


def timed(job: Callable[[], Any]) -> Run:
    """Run it by the clock."""
    began = time.perf_counter()
    cpu = time.process_time()
    result = job()
    return Run(result, time.perf_counter() - began, time.process_time() - cpu, 0)


def watched(job: Callable[[], Any]) -> Run:
    """Run it by the clock, with a thread that polls this process' memory every 5 ms."""
    done = threading.Event()
    before = peak = kilobytes("/proc/self/status", "RssAnon:")

    def poll() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, kilobytes("/proc/self/status", "RssAnon:"))

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        run = timed(job)
    finally:
        done.set()
        thread.join()
    return run._replace(memory=peak - before)


def compare(
    jobs: dict[str, Callable[[], Any]], repeats: int, *, turns: bool = True
) -> list[dict[str, Any]]:
    """Every job in turns, or each one's runs together; the first one's median is the unit of the ratios."""
    first = {name: watched(job) for name, job in jobs.items()}
    runs: dict[str, list[Run]] = {
        name: [run] if run.seconds > SLOW else [] for name, run in first.items()
    }
    leader = next(iter(jobs))
    names = list(jobs) * repeats if turns else [name for name in jobs for _ in range(repeats)]
    for name in names:
        if not runs[name] or name == leader or first[name].seconds <= SLOW:
            runs[name].append(timed(jobs[name]))
    rows = []
    for name, of in runs.items():
        seconds = statistics.median(run.seconds for run in of)
        cpu = statistics.median(run.cpu for run in of)
        rows.append(
            {
                "solver": name,
                "seconds": seconds,
                "seconds_min": min(run.seconds for run in of),
                "cpu": cpu,
                "runs": len(of),
                "memory": first[name].memory,
                "result": first[name].result,
            }
        )
        rows[-1] |= {"ratio": seconds / rows[0]["seconds"], "ratio_cpu": cpu / rows[0]["cpu"]}
    return rows


def measure(shape: tuple[int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each solver on a matrix of this shape."""
    case = make_case(shape, args.spectrum, args.rank, args.torch_dtype, args.seed, args.device)
    jobs: dict[str, Callable[[], Any]] = {}
    for solver in args.solver_names:
        if solver == "peft":
            jobs[solver] = lambda: run_peft(case, args.top_k, args.epsilon)
        else:
            jobs[solver] = lambda solver=solver: run_ours(case, solver, args.top_k, args.epsilon)
    rows = compare(jobs, args.repeats)
    dense = next((row["result"] for row in rows if row["solver"] == "dense"), None)
    for row in rows:
        found = row.pop("result")
        ours = isinstance(found, Detection)
        agrees = None
        if dense is not None:
            agrees = found.intruders == dense.intruders if ours else found == len(dense.intruders)
        row |= {
            "shape": list(shape),
            "intruders": len(found.intruders) if ours else found,
            "agrees": agrees,
            "steps": found.steps if ours else None,
            "products": found.products if ours else None,
            "certified": found.certified if ours else None,
            "escalated": found.escalated if ours else None,
        }
    return rows


def topk_jobs(
    W: Tensor, base: Dense, delta: LowRank, k: int
) -> dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]]:
    """The leading triplets of W by every solver that is installed, asked for the accuracy of float32 decisions: 1e-5."""

    def krylov() -> tuple[Tensor, Tensor, Tensor]:
        found = krylov_triplets(
            Sum(base, delta), k, torch.Generator().manual_seed(0), W, triplets_columns(k), 400
        )
        if not found.converged:
            raise RuntimeError("the Krylov process did not converge")
        return found.triplets.U, found.triplets.S, found.triplets.Vh

    def lowrank() -> tuple[Tensor, Tensor, Tensor]:
        U, S, V = torch.svd_lowrank(W, q=min(k + 6, *W.shape), niter=8)
        return U[:, :k], S[:k], V.T[:k]

    jobs: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
        "krylov": krylov,
        "torch.svd_lowrank": lowrank,
    }

    def sorted_back(U: Any, S: Any, Vh: Any) -> tuple[Tensor, Tensor, Tensor]:
        order = (-S).argsort()
        return tuple(torch.from_numpy(a.copy()) for a in (U[:, order], S[order], Vh[order]))  # type: ignore[return-value]

    if W.device.type == "cpu" and importlib.util.find_spec("scipy"):
        import numpy as np
        from scipy.sparse.linalg import svds

        A = W.numpy()
        for solver in ("arpack", "propack", "lobpcg"):
            jobs[f"scipy {solver}"] = lambda solver=solver: sorted_back(
                *svds(A, k=k, solver=solver, tol=1e-5, random_state=np.random.RandomState(0))
            )
    if W.device.type == "cpu" and importlib.util.find_spec("primme"):
        import primme

        A = W.numpy()
        jobs["primme"] = lambda: sorted_back(*primme.svds(A, k, tol=1e-5))
    return jobs


def measure_topk(shape: tuple[int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each solver of the top-k stage; a solver that fails says so."""
    case = make_case(shape, args.spectrum, args.rank, args.torch_dtype, args.seed, args.device)
    base = Dense(case.weight.float())
    delta = case.delta
    W = Sum(base, delta).dense()
    jobs = topk_jobs(W, base, delta, args.top_k)
    failed = []
    for name, job in list(jobs.items()):
        try:
            job()
        except Exception as e:  # a peer's failure is a result
            failed.append(
                {"shape": list(shape), "solver": name, "error": f"{type(e).__name__}: {e}"}
            )
            del jobs[name]
    # scipy's BLAS has threads of its own, which go on spinning for a while and slow whoever comes next.
    rows = compare(jobs, args.repeats, turns=False)
    for row in rows:
        U, S, Vh = (t.to(W) for t in row.pop("result"))
        row |= {
            "shape": list(shape),
            "residual": float(residuals(Dense(W), U, S, Vh).max() / float(S[0])),
        }
    return rows + failed


def measure_block(args: argparse.Namespace) -> dict[str, Any]:
    """The certified solver on each linear layer of a block in bf16, and what 32 blocks would take."""
    rows = []
    for seed, (name, shape) in enumerate(BLOCK.items()):
        case = make_case(
            shape, args.spectrum, args.rank, torch.bfloat16, args.seed + seed, args.device
        )
        (row,) = compare(
            {"certified": lambda case=case: run_ours(case, "certified", args.top_k, args.epsilon)},
            args.repeats,
        )
        found = row.pop("result")
        rows.append(
            row
            | {
                "shape": list(shape),
                "layer": name,
                "intruders": len(found.intruders),
                "agrees": None,
                "steps": found.steps,
                "products": found.products,
                "certified": found.certified,
                "escalated": found.escalated,
            }
        )
    seconds = sum(row["seconds"] for row in rows)
    return {
        "rows": rows,
        "seconds": seconds,
        "layers": LAYERS,
        "projected_seconds": LAYERS * seconds,
    }


def table(tree: dict[str, Any]) -> str:
    """The result for people."""
    m = tree["machine"]
    lines = [
        f"{m['cores']} cores ({m['cpu']}), {tree['threads']} threads, torch {m['torch']}, {tree['device']}; "
        f"{tree['spectrum']} spectrum, {tree['dtype']}, rank {tree['rank']}, k = {tree['top_k']}, ε = {tree['epsilon']}"
    ]
    head = f"{'shape':<13}{'solver':<11}{'s':>9}{'runs':>6}{'ratio':>8}{'cpu s':>9}{'ratio':>8}{'steps':>7}"
    head += f"{'products':>10}{'MB':>8}{'intruders':>11}  agrees  decided"

    def line(row: dict[str, Any], label: str) -> str:
        steps, products = ("-" if row[key] is None else row[key] for key in ("steps", "products"))
        agrees = {None: "-", True: "yes", False: "NO"}[row["agrees"]]
        decided = "-" if row["certified"] is None else "certified" if row["certified"] else "open"
        decided += " (escalated)" if row["escalated"] else ""
        return (
            f"{'x'.join(map(str, row['shape'])):<13}{label:<11}{row['seconds']:>9.3f}{row['runs']:>6}{row['ratio']:>8.1f}"
            f"{row['cpu']:>9.3f}{row['ratio_cpu']:>8.1f}"
            f"{steps:>7}{products:>10}{row['memory'] / 1e6:>8.0f}{row['intruders']:>11}  {agrees:<8}{decided}"
        )

    if tree["rows"]:
        lines += ["", head, *(line(row, row["solver"]) for row in tree["rows"])]
    if tree["topk"]:
        lines += [
            "",
            f"{'shape':<13}{'top-k by':<20}{'s':>9}{'runs':>6}{'ratio':>8}{'MB':>8}{'residual/σ_1':>14}",
        ]
        for row in tree["topk"]:
            if "error" in row:
                cells = f"  {row['error']}"
            else:
                cells = f"{row['seconds']:>9.3f}{row['runs']:>6}{row['ratio']:>8.1f}{row['memory'] / 1e6:>8.0f}"
                cells += f"{row['residual']:>14.1e}"
            lines.append(f"{'x'.join(map(str, row['shape'])):<13}{row['solver']:<20}{cells}")
    if tree["block"]:
        b = tree["block"]
        lines += ["", head, *(line(row, row["layer"]) for row in b["rows"])]
        lines.append(
            f"one block {b['seconds']:.1f} s; {b['layers']} blocks {b['projected_seconds']:.0f} s"
        )
    return "\n".join(lines)


def shape_of(text: str) -> tuple[int, int]:
    try:
        m, n = (int(side) for side in text.split("x"))
    except ValueError:
        raise SystemExit(
            f"--shapes: expected ROWSxCOLUMNS, comma-separated, found {text!r}"
        ) from None
    if min(m, n) < 1:
        raise SystemExit(f"--shapes: sides from 1, found {text!r}")
    return m, n


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="2048x2048", metavar="MxN,…", help="default: 2048x2048")
    parser.add_argument(
        "--spectrum", choices=PLANTED, default="power", help="of the base (default: power)"
    )
    parser.add_argument(
        "--rank", type=int, default=16, metavar="R", help="of the adapter (default: 16)"
    )
    parser.add_argument(
        "--top-k", type=int, default=10, metavar="K", help="directions judged (default: 10)"
    )
    parser.add_argument(
        "--epsilon", type=float, default=0.5, metavar="X", help="threshold (default: 0.5)"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the base (default: fp32)"
    )
    parser.add_argument(
        "--solvers",
        default="certified,dense",
        metavar="NAME,…",
        help="of certified, blocks, dense, peft; the first is the ratios' unit (default: certified,dense)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--topk-peers",
        action="store_true",
        help="instead: the top-k stage against scipy's svds, torch.svd_lowrank, and primme where installed",
    )
    what.add_argument(
        "--block",
        action="store_true",
        help="instead: a Llama-3-8B block in bf16, certified, times 32",
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of torch (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: cpu)")
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="timed runs of each (default: 5)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="another seed, other values (default: 0)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; seconds and bytes"
    )
    args = parser.parse_args()
    args.solver_names = args.solvers.split(",")
    unknown = set(args.solver_names) - {"certified", "blocks", "dense", "peft"}
    if unknown:
        parser.error(
            f"--solvers: expected certified, blocks, dense, peft, found {', '.join(sorted(unknown))}"
        )
    if "peft" in args.solver_names and not importlib.util.find_spec("peft"):
        parser.error("--solvers: peft is not installed; pip install peft")
    if min(args.repeats, args.rank, args.threads, args.top_k) < 1:
        parser.error("--repeats, --rank, --threads and --top-k: at least 1")
    if "peft" in args.solver_names:
        importlib.import_module(
            "peft.tuners.lora.intruders"
        )  # which takes seconds that are not the solver's
    shapes = [shape_of(text) for text in args.shapes.split(",")]
    args.torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    torch.set_num_threads(args.threads)
    tree: dict[str, Any] = {
        "schema": "streamer.bench-detect/1",
        "machine": machine(),
        "threads": args.threads,
        "device": args.device,
        "spectrum": args.spectrum,
        "dtype": "bf16" if args.block else args.dtype,
        "rank": args.rank,
        "top_k": args.top_k,
        "epsilon": args.epsilon,
        "rows": [],
        "topk": [],
        "block": None,
    }
    if args.block:
        tree["block"] = measure_block(args)
    else:
        for shape in shapes:
            key = "topk" if args.topk_peers else "rows"
            tree[key] += measure_topk(shape, args) if args.topk_peers else measure(shape, args)
    print(json.dumps(tree, indent=1) if args.json else table(tree))


if __name__ == "__main__":
    sys.exit(main())
