"""Offer detection as a function of the library."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Unpack, overload

from streamer.adapters.batch import named_adapters
from streamer.adapters.stated import LoraBLayout, Stated
from streamer.api.keywords import Detecting, Several, detection_options, run_options
from streamer.detection.findings import Findings
from streamer.detection.run import detect_many
from streamer.detection.workers import Workers
from streamer.events import Monitor, OnEvent
from streamer.progress import monitoring
from streamer.remote.inputs import Remote, RemoteMode
from streamer.storage.tensor_file import IOMode


@overload
def detect_intruder_dimensions(
    base: str | Path, adapter: str | Path, output: str | Path | None = None, **options: Unpack[Detecting]
) -> Findings: ...
@overload
def detect_intruder_dimensions(
    base: str | Path, adapter: Several, output: str | Path | None = None, **options: Unpack[Detecting]
) -> dict[str, Findings]: ...
def detect_intruder_dimensions(
    base: str | Path,
    adapter: str | Path | Several,
    output: str | Path | None = None,
    *,
    top_k: int | float = 10,
    threshold_epsilon: float = 0.5,
    solver: str = "auto",
    max_memory: int | str | None = None,
    device: str = "auto",
    io: IOMode = "mmap",
    base_is_residual: bool = False,
    lora_b_layout: LoraBLayout | None = None,
    ignore_keys: Sequence[str] = (),
    architecture: str | None = None,
    remote: RemoteMode | None = None,
    resume: bool = True,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
    monitor: Monitor | None = None,
    progress: bool | None = None,
    executor: Executor | None = None,
) -> Findings | dict[str, Findings]:
    """Find the intruder dimensions of ``W0 + s·B·A`` in every matrix that the adapter changes.

    Parameters
    ----------
    base
        Directory of the base model, with ``model.safetensors`` or an index and its shards; or one ``.safetensors`` file.
    adapter
        Directory of a PEFT adapter, or of a fully fine-tuned model; or several, in a list or tuple, where a directory of adapters
        stands for those in it: each matrix of the base is then read once for all.
    output
        Findings file to write as detection goes; a killed run resumes from the journal beside it. None keeps the findings in
        memory. Of several adapters a directory, where ``NAME.safetensors`` is written for the adapter in ``…/NAME``.
    top_k
        Leading singular directions of each matrix that are judged: a count from 1, or a share of min(rows, columns), a float in (0, 1].
    threshold_epsilon
        An intruder is a direction whose similarity, its largest |cosine| to a left singular vector of the base, is below this, in (0, 1].
    solver
        ``certified``: block Krylov with proven bounds, and the dense solver where these settle nothing; ``dense``: LAPACK's full
        SVD; ``auto``: the cheaper one for each matrix.
    max_memory
        Anonymous memory of Python, torch and streamer (200M, or 350M with a GPU's torch, before any matrix), without your program's data,
        in bytes or as a size like ``"4G"`` (powers of 1024); None takes what is needed. Under a budget large matrices are multiplied as
        they are stored, and what only a full SVD could settle stays open. Too small a one is refused.
    device
        ``cpu``, ``cuda``, ``cuda:i``, or ``auto``: CUDA where there is one.
    io
        How tensors are read: ``mmap``, or ``pread`` for network file systems, where it takes a copy of each matrix in memory.
    base_is_residual
        True if `base` is what PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ left of the model; their adapters are refused without it.
    lora_b_layout
        Order of ``lora_B``'s columns on stacked experts, if not in the config: ``rank_major`` (PEFT) or ``grouped_by_expert`` (older
        Unsloth).
    ignore_keys
        Keys of ``adapter_config.json`` that are not known and have no effect, as you say: they are refused otherwise.
    architecture
        Class of the base in transformers, like ``"GPT2LMHeadModel"``, if its ``config.json`` is missing or names one that is not known.
    remote
        For inputs at addresses: ``cache`` downloads them first, ``stream`` reads ranges; None: ``cache`` from the hub, else ``stream``.
    resume
        Whether to take up an interrupted run with the same inputs and options; False starts it over.
    overwrite
        Whether to replace what stands at `output`: findings or an interrupted run of other inputs or options, and nothing else.
    on_event
        Called with an `Event` at each step, warnings included. Without it and `monitor`, Python warns, with `StreamerWarning`.
    monitor
        In place of `on_event`, a `Monitor`, for callers that also want to stop a run at its next safe point.
    progress
        True draws tqdm bars. None draws them in a notebook if there is neither `on_event` nor `monitor`.
    executor
        Workers that detect in place of this process: any `concurrent.futures.Executor`, of threads, processes, or an engine such as
        ``dask.distributed.Client.get_executor()``. They read the inputs at the same paths. Findings are byte for byte those of this
        process with torch's present number of threads, which each task has, as it has `max_memory`. Where a worker dies its tasks
        are done again, once, if the executor replaces it; a `ProcessPoolExecutor` does not, and the run ends with `WorkerError`.

    Returns
    -------
    Findings
        One entry a matrix; `reduce_intruder_dimension` and `merge_with_reduced_intruder_dimensions` take it.
        Of several adapters a dict of them by the adapters' names.

    Raises
    ------
    StreamerError
        Its class says what kind of fault it is (see `streamer.errors`), and may be one of Python's: `ValueError` for options and inputs,
        `FileNotFoundError` for missing inputs, `FileExistsError` for an output that may not be replaced.
    """
    options = detection_options(top_k, threshold_epsilon, solver, max_memory)
    with monitoring(on_event, monitor, progress) as watcher:
        run = run_options(
            device, io, Stated(base_is_residual, lora_b_layout, ignore_keys), architecture, watcher, resume, overwrite
        )
        if executor is not None:
            run = replace(run, workers=Workers.of(executor))
        inputs = Remote(remote, monitor=run.monitor)
        base = inputs.path(base)
        adapters = named_adapters(inputs.path(adapter) if isinstance(adapter, str | Path) else inputs.paths(adapter))
        found = detect_many(base, adapters, output, options, run)
        return found[""] if "" in adapters else found
