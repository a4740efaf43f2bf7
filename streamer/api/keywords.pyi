"""Types of the keywords that functions accept as ``**options``; ``tools/make_keywords.py`` writes them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from concurrent.futures import Executor
from typing import Literal, TypedDict

from streamer.adapters.adapter_config import LoraBLayout
from streamer.detection.findings import Findings
from streamer.evaluation.evaluation import Evaluation
from streamer.json_types import Selection
from streamer.measuring.facts import ProductDtype
from streamer.methods import MethodName
from streamer.methods.files import Coefficients, InputMap
from streamer.output.opening import FindingsOrPath
from streamer.output.record import MergedDtype
from streamer.remote.inputs import RemoteMode
from streamer.storage.checkpoint import IOMode
from streamer.events import Monitor, OnEvent

class DetectKeywords(TypedDict, total=False):
    on_event: OnEvent | None
    monitor: Monitor | None
    progress: bool | None
    io: IOMode
    remote: RemoteMode | None
    architecture: str | None
    ignore_keys: Sequence[str]
    base_is_residual: bool
    lora_b_layout: LoraBLayout | None
    device: str
    max_memory: int | str | None
    top_k: int | float | None
    threshold_epsilon: float | None
    solver: str | None
    resume: bool
    overwrite: bool
    executor: Executor | None

class ReduceKeywords(TypedDict, total=False):
    on_event: OnEvent | None
    monitor: Monitor | None
    progress: bool | None
    io: IOMode
    remote: RemoteMode | None
    architecture: str | None
    ignore_keys: Sequence[str]
    base_is_residual: bool
    lora_b_layout: LoraBLayout | None
    device: str
    max_memory: int | str | None
    top_k: int | float | None
    threshold_epsilon: float | None
    solver: str | None
    amplify: bool
    coefficients: Coefficients | str | Path | None
    map: InputMap | str | Path | None
    select: Selection
    mitigation_lambda: float | None
    method: MethodName | None
    findings: FindingsOrPath
    resume: bool
    overwrite: bool
    model_card: bool
    for_server: bool
    to_lora: int | float | None

class MergeKeywords(TypedDict, total=False):
    on_event: OnEvent | None
    monitor: Monitor | None
    progress: bool | None
    io: IOMode
    remote: RemoteMode | None
    architecture: str | None
    ignore_keys: Sequence[str]
    base_is_residual: bool
    lora_b_layout: LoraBLayout | None
    device: str
    max_memory: int | str | None
    top_k: int | float | None
    threshold_epsilon: float | None
    solver: str | None
    amplify: bool
    coefficients: Coefficients | str | Path | None
    map: InputMap | str | Path | None
    select: Selection
    mitigation_lambda: float | None
    method: MethodName | None
    findings: FindingsOrPath
    resume: bool
    overwrite: bool
    model_card: bool
    dequantize: bool
    requantize: InputMap | str | Path | None
    dtype: MergedDtype | None
    max_shard_size: str | int | None
    executor: Executor | None

class IterateKeywords(TypedDict, total=False):
    on_event: OnEvent | None
    monitor: Monitor | None
    progress: bool | None
    io: IOMode
    remote: RemoteMode | None
    architecture: str | None
    ignore_keys: Sequence[str]
    base_is_residual: bool
    lora_b_layout: LoraBLayout | None
    device: str
    max_memory: int | str | None
    top_k: int | float | None
    threshold_epsilon: float | None
    solver: str | None
    amplify: bool
    coefficients: Coefficients | str | Path | None
    map: InputMap | str | Path | None
    select: Selection
    mitigation_lambda: float | None
    method: MethodName | None
    findings: FindingsOrPath
    dequantize: bool
    tensors: Callable[[str], bool] | None

class EvaluateKeywords(TypedDict, total=False):
    on_event: OnEvent | None
    monitor: Monitor | None
    progress: bool | None
    io: IOMode
    remote: RemoteMode | None
    architecture: str | None
    ignore_keys: Sequence[str]
    base_is_residual: bool
    lora_b_layout: LoraBLayout | None
    device: str
    max_memory: int | str | None
    dtype: ProductDtype
    amplify: bool
    coefficients: Coefficients | str | Path | None
    map: InputMap | str | Path | None
    select: Selection
    findings: Findings | str | Path | None
    lambdas: Sequence[float]
    methods: Sequence[MethodName] | None
    keep: float
    projected: bool
    sequences: int
    length: int
    general: str | Path | None
    task: str | Path | None
    prompts: str | Path | None
    seed: int
    resume: bool
    overwrite: bool
    other: str | Path | Sequence[str | Path]

class MapKeywords(TypedDict, total=False):
    on_event: OnEvent | None
    monitor: Monitor | None
    progress: bool | None
    io: IOMode
    remote: RemoteMode | None
    architecture: str | None
    device: str
    max_memory: int | str | None
    dtype: ProductDtype
    sequences: int
    length: int
    resume: bool
    overwrite: bool
    vectors: int

class RepairKeywords(TypedDict, total=False):
    on_event: OnEvent | None
    monitor: Monitor | None
    progress: bool | None
    io: IOMode
    remote: RemoteMode | None
    architecture: str | None
    ignore_keys: Sequence[str]
    base_is_residual: bool
    lora_b_layout: LoraBLayout | None
    device: str
    max_memory: int | str | None
    dtype: ProductDtype
    sequences: int
    length: int
    general: str | Path | None
    task: str | Path | None
    prompts: str | Path | None
    seed: int
    resume: bool
    overwrite: bool
    for_server: bool
    keep: float
    weights: Sequence[float]
    holdout: float
    to_lora: int | float | None
    merge: bool
    dequantize: bool
    model_card: bool

class VerifyKeywords(TypedDict, total=False):
    on_event: OnEvent | None
    monitor: Monitor | None
    progress: bool | None
    sample: int | Literal["all"]
    coefficients: str | Path | None
    map: str | Path | None

class LiveDetectKeywords(TypedDict, total=False):
    on_event: OnEvent | None
    monitor: Monitor | None
    progress: bool | None
    ignore_keys: Sequence[str]
    device: str
    solver: str | None

class LiveKeywords(TypedDict, total=False):
    on_event: OnEvent | None
    monitor: Monitor | None
    progress: bool | None
    ignore_keys: Sequence[str]
    device: str
    solver: str | None
    amplify: bool
    coefficients: Coefficients | str | Path | None
    map: InputMap | str | Path | None
    select: Selection
    method: MethodName | None
    findings: Findings | str | Path | None
