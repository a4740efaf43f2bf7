"""Read ``adapter_config.json`` by PEFT's rules for ranks, scalings and wrapped parameters, and refuse adapters of an unsupported kind.

PEFT's ``target_parameters`` puts LoRA on parameters of a module, typically on the experts of a mixture. PEFT wraps the module once for each
parameter; the parameter registered first is innermost. The factors are stored under the module's name, with ``base_layer`` appended once or
more for inner wrappers; which parameter each belongs to is not stored. lora_A is (E·r, in), and its row e·r + k is expert e's k-th. lora_B
is (out, r·E), and its column k·E + e is expert e's k-th. Until September 2026 Unsloth stored that column at e·r + k. Shapes and norms are
the same, so only the config or the user can say which.

Adapters are refused, or warned of, by their own files. A new kind is an entry of `RULES`; a new key without effect, of `KNOWN_KEYS`. Any
other key of ``adapter_config.json`` may change what the tensors mean, so it is refused unless it is empty or the user insists.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from streamer.errors import FormatError, MismatchError, MissingInputError, UnsupportedError
from streamer.storage.checkpoint import TensorFile
from streamer.units import listed, quoted

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LORA_NAME = "pytorch_lora_weights.safetensors"  # of a diffusers pipeline

MAX_REPEATS = 4
"""Most open-ended repeats in one pattern: each may multiply the time by the name's length."""

LoraBLayout = Literal["rank_major", "grouped_by_expert"]
"""Order of lora_B's columns for stacked experts: rank by rank, as PEFT stores them, or expert by expert, as Unsloth did."""

_LAYOUTS = get_args(LoraBLayout)


@dataclass(frozen=True)
class Stated:
    """Facts about a run's adapters; `api.detect_intruder_dimensions` explains them as keywords.

    `options.OfAdapter` bounds them.
    """

    base_is_residual: bool = False
    lora_b_layout: LoraBLayout | None = None
    ignore_keys: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignore_keys", tuple(self.ignore_keys))


NOTHING_STATED = Stated()


@dataclass(frozen=True)
class AdapterConfig:
    """Values of an ``adapter_config.json``, its path for messages, and what the user states in addition."""

    values: Mapping[str, Any]
    path: Path
    stated: Stated = NOTHING_STATED

    def get(self, key: str, default: Any = None) -> Any:
        """Return a key's value, or the default if the config does not have it."""
        return self.values.get(key, default)

    def strings(self, key: str) -> list[str]:
        """Return the nonempty strings of a key that holds a list."""
        stated = self.values.get(key) or []
        return [s for s in stated if isinstance(s, str) and s] if isinstance(stated, list) else []

    @property
    def peft_type(self) -> Any:
        """Return PEFT's name of the method."""
        return self.values.get("peft_type", "LORA")

    @property
    def base_model(self) -> Any:
        """Return the model that the adapter was trained on: a hub id or a path."""
        return self.values.get("base_model_name_or_path")

    def number(
        self, pattern_key: str, key: str, module: str, default: float | None = None
    ) -> float:
        """Return a module's number: from the first matching pattern, else from the config, else the default.

        Raises
        ------
        FormatError
            If the value is not a number, or the patterns cannot be matched.
        """
        patterns = self.values.get(pattern_key) or {}
        if not isinstance(patterns, dict):
            raise FormatError(
                f"{self.path}: {pattern_key}: expected an object, found {type(patterns).__name__}"
            )
        try:
            pattern = first_match(patterns, module)
        except ValueError as e:
            raise FormatError(f"{self.path}: {pattern_key}: {e}") from None
        value = self.values.get(key, default) if pattern is None else patterns[pattern]
        if isinstance(value, bool) or not isinstance(value, int | float):
            whose = f" of module {module!r}" if module else ""
            raise FormatError(f"{self.path}: {key}{whose}: expected a number, found {value!r}")
        return float(value)

    def lora_scaling(self, module: str, rank: int) -> float:
        """Return the scaling of a LoRA module with this many rows in ``lora_A``: ``alpha/r``, or ``alpha/√r`` for rsLoRA.

        Raises
        ------
        MismatchError, FormatError
            If the config states another rank, or no usable number.
        """
        stated = self.number("rank_pattern", "r", module, default=rank)
        if stated != rank:
            ranks = f"expected rank {stated:g} by the config, found {rank} rows in lora_A"
            raise MismatchError(
                f"{self.path}: module {module!r}: {ranks}; config and weights belong to different adapters"
            )
        alpha = self.number("alpha_pattern", "lora_alpha", module)
        by = math.sqrt(rank) if self.values.get("use_rslora") else rank
        return self._finite(alpha / by, module)

    def method_scaling(self, module: str) -> tuple[int, float]:
        """Return the rank and the scaling ``alpha/r`` of a module of a method other than LoRA."""
        rank = int(self.number("rank_pattern", "r", module))
        alpha = self.number("alpha_pattern", "alpha", module)
        return rank, self._finite(alpha / rank if rank else 0.0, module)

    def _finite(self, scaling: float, module: str) -> float:
        if not math.isfinite(scaling) or scaling == 0:
            raise FormatError(
                f"{self.path}: module {module!r}: its alpha gives a scale of {scaling!r}, expected a finite number other than 0"
            )
        return scaling


def stated_options(identity: Mapping[str, Any]) -> list[str]:
    """List the command-line options that state again what an adapter's identity records as stated."""
    words = ["--base-is-residual"] if identity.get("base_is_residual") else []
    if layout := identity.get("lora_b_layout"):
        words += ["--lora-b-layout", layout]
    for key in identity.get("ignored_keys", ()):
        words += ["--ignore-key", key]
    return words


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """Find the first pattern, in the config's order, that matches a tail of the module's path, as PEFT does.

    Raises
    ------
    ValueError
        If a pattern is not a regular expression, or might never finish: it repeats a group after a repeat or branch, or has many repeats.
        Configs are downloaded and not trusted.
    """
    for pattern in patterns:
        repeats = sum(map(pattern.count, ("*", "+", ",}")))
        if repeats > MAX_REPEATS or re.search(r"[*+?|}].*\)[*+{]", pattern):
            raise ValueError(
                f"pattern {quoted(pattern)} may never finish matching; write it without repeated groups"
            )
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return pattern
        except (re.error, OverflowError, RecursionError) as e:
            raise ValueError(
                f"pattern {quoted(pattern)} is not a regular expression: {e}"
            ) from None
    return None


LAYOUT_KEY = "lora_B_layout"
LAYOUT_DETAILS = "unsloth_fused_expert_lora"

INNER = ".base_layer"


@dataclass(frozen=True)
class Wrapped:
    """Wrappers of one module.

    Attributes
    ----------
    module
        Path of the module in the model.
    parameters
        The module's parameters that the config names, one for each wrapper.
    factors
        Names of each wrapper's lora_A and lora_B, the innermost first.
    """

    module: str
    parameters: tuple[str, ...]
    factors: tuple[tuple[str, str], ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Return the wrappers' names on disk."""
        return tuple(self.module + INNER * depth for depth in range(len(self.factors)))

    def matched_as(self, parameter: str) -> str:
        """Return the name by which to search a base for a parameter."""
        return f"{self.module}.{parameter}".removesuffix(".weight")


def find_wrapped(
    pairs: Mapping[str, Mapping[str, str]],
    config: AdapterConfig,
    is_matrix: Callable[[str, str], bool],
) -> tuple[list[Wrapped], list[str]]:
    """Find the wrapped modules among those with factors, and everything that is wrong with them, one phrase each.

    Parameters
    ----------
    pairs
        Module → {"A": tensor, "B": tensor}; inner wrappers appear under their names on disk.
    is_matrix
        Tests whether a parameter's lora_A has as many rows as the rank; the parameter is then a plain matrix, not a stack.
    """
    wrapped = []
    wrong = []
    bare_names = {*config.strings("target_parameters")} - {"weight"}
    for name, factors in pairs.items():
        if name.endswith(INNER):
            continue
        layers = [factors]
        while inner := pairs.get(name + INNER * len(layers)):
            layers.append(inner)
        parameters = targeted_parameters(config, name)
        # ``gate_up_proj`` names a parameter of any module that has one; if lora_A fits a single matrix, it belongs to the module's weight.
        bare = parameters & bare_names
        if bare and len(layers) == 1 and is_matrix(name, factors["A"]):
            parameters -= bare
        of_weight = parameters == {"weight"} and is_matrix(f"{name}.weight", factors["A"])
        if not parameters or of_weight:
            continue
        if len(parameters) != len(layers):
            named = f"{len(parameters)} of its parameters ({listed(sorted(parameters))})"
            wrong.append(
                f"module {name!r}: target_parameters names {named}, but there are factors for {len(layers)}"
            )
        innermost_first = tuple((f["A"], f["B"]) for f in reversed(layers))
        wrapped.append(Wrapped(name, tuple(sorted(parameters)), innermost_first))
    known = {name for w in wrapped for name in w.layers}
    strays = (name for name in pairs if name.endswith(INNER) and name not in known)
    wrong += [f"module {name!r}: target_parameters names none of its parameters" for name in strays]
    return wrapped, wrong


def targeted_parameters(config: AdapterConfig, module: str) -> set[str]:
    """List a module's parameters that a config names, by their own names; PEFT's rule."""
    named = ((target, target.rpartition(".")[2]) for target in config.strings("target_parameters"))
    return {own for target, own in named if f".{module}.{own}".endswith(f".{target}")}


def layout_refusals(config: AdapterConfig) -> list[str]:
    """Return the reason to refuse the config's order of lora_B's columns, if any."""
    rows = _layouts(config, "lora_A_layout")
    columns = _layouts(config, LAYOUT_KEY)
    stated = config.stated.lora_b_layout
    if rows - {"grouped_by_expert"}:
        return [f"lora_A_layout is {listed(sorted(rows))}, expected grouped_by_expert"]
    if len(columns) > 1 or columns - ({stated} if stated else {*_LAYOUTS}):
        expected = " or ".join(_LAYOUTS)
        if stated:
            expected = f"{stated} (as --lora-b-layout says; leave it out)"
        return [f"{LAYOUT_KEY} is {listed(sorted(columns))}, expected {expected} for all experts"]
    return []


def stored_layout(config: AdapterConfig) -> str | None:
    """Return the order of lora_B's columns that a config states, or None."""
    return next(iter(_layouts(config, LAYOUT_KEY)), None)


def is_grouped(config: AdapterConfig, path: Path, metadata: Mapping[str, str]) -> bool:
    """Test whether the columns of an adapter's lora_B are grouped by expert.

    Parameters
    ----------
    path
        The adapter's directory.
    metadata
        Metadata of the weights file.

    Raises
    ------
    UnsupportedError
        If Unsloth may have written the adapter, and neither its config nor the user states the order.
    """
    layout = stored_layout(config) or config.stated.lora_b_layout
    # Adapters written by streamer are in PEFT's order, even if their card names Unsloth as the trainer.
    if layout is None and "streamer" not in metadata:
        card = path / "README.md"
        text = card.read_text("utf-8", "replace") if card.is_file() else ""
        if "unsloth" in f"{json.dumps([config.values, dict(metadata)])}{text}".lower():
            raise UnsupportedError(
                f"{config.path}: refused: LoRA on stacked experts, and config, metadata or README.md names Unsloth, which grouped lora_B "
                "by expert until September 2026; pass --lora-b-layout grouped_by_expert if older, else --lora-b-layout rank_major"
            )
    return layout == "grouped_by_expert"


def _layouts(config: AdapterConfig, key: str) -> set[str]:
    """Collect every order that a config states under a key, at any depth: for each of the experts' parameters, or for all."""
    stated = re.findall(rf'"{key}": ("[^"]*"|[^,}}\]]*)', json.dumps(config.values))
    return {value.strip('"')[:30] for value in stated if value != "null"}


INSTEAD = "merge it with PEFT if it can, else use it unmerged"

RESIDUAL = "residual-base initialisation"

_ON_RESIDUAL = (
    "its delta is relative to a residual of the base; save the adapter again with path_initial_model_for_weight_conversion, or give the "
    "residual as the base and pass --base-is-residual"
)
_RESIDUAL_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "default", "true", "false")
_NOT_KNOWN = "its change of the weights is not known here"


class Rule(NamedTuple):
    """Refusal by a key of a method's config: the kind of adapter that it shows, the reason, and the test of its value."""

    key: str
    kind: str
    reason: str
    applies: Callable[[Any], bool] = bool
    method: str = "LORA"


def _no_number(value: object) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30


MOST_TERMS = 1000
"""Most terms of a Neumann series; PEFT's default is 5. A config may ask for any number, and each term costs a product for each matrix."""

KINDS = {
    "alora_invocation_tokens": "aLoRA",
    "invocation_string": "aLoRA",
    "enable_lora": "MergedLinear",
    "arrow_config": "Arrow",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron LoRA",
}
"""Kinds of LoRA by the keys that show them, which no merged weight can express, or whose tensors mean something else."""

RULES = (
    Rule(
        "init_lora_weights",
        RESIDUAL,
        _ON_RESIDUAL,
        lambda v: isinstance(v, str) and v.lower().startswith(_RESIDUAL_INITS),
    ),
    Rule("loftq_config", RESIDUAL, _ON_RESIDUAL),
    Rule(
        "init_lora_weights",
        "unknown initialisation",
        "it may have changed the base",
        lambda v: (
            isinstance(v, str)
            and v.lower() not in _PLAIN_INITS
            and not v.lower().startswith(_RESIDUAL_INITS)
        ),
    ),
    *(Rule(key, kind, _NOT_KNOWN) for key, kind in KINDS.items()),
    Rule(
        "save_projection",
        "VeRA",
        "its projections are not in the file, and only the library that trained it can generate them again",
        lambda v: v is False,
        "VERA",
    ),
    Rule("eps", "OFT", "expected eps to be a number", _no_number, "OFT"),
    Rule(
        "num_cayley_neumann_terms",
        "OFT",
        f"expected num_cayley_neumann_terms from 1 to {MOST_TERMS}",
        lambda v: _no_number(v) or not 1 <= v <= MOST_TERMS,
        "OFT",
    ),
    Rule(
        "init_weights",
        "MiSS mini",
        "its block, repeated along the output, would fit other bases too",
        lambda v: v == "mini",
        "MISS",
    ),
    Rule(
        "boft_n_butterfly_factor",
        "BOFT",
        "only a boft_n_butterfly_factor of 1 can be checked against PEFT on a CPU",
        lambda v: v != 1,
        "BOFT",
    ),
    *(
        Rule(
            "fan_in_fan_out",
            kind,
            "PEFT does not merge this method into a layer that stores (in, out)",
            bool,
            kind,
        )
        for kind in ("OFT", "BOFT")
    ),
)

NEUTRAL = {
    # The name of the base, its revision on the hub, and the class that PEFT wrapped.
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    # Whether the adapter stays frozen when it is loaded.
    "inference_mode",
    # Written by trainers: Unsloth's mark that it corrected the base's tokenizer; ms-swift's dtype and learning rates.
    "unsloth_fixed",
    "lora_dtype",
    "lorap_lr_ratio",
    "lorap_emb_lr",
}
"""Keys that say nothing of the delta."""

_EVERY_METHOD = NEUTRAL | {
    # Read: the method; the orientation of square experts, by version; the class of a merged model, by task; modules saved whole; ranks and
    # scalings; which biases are saved; whether the base stores (in, out).
    "peft_type",
    "peft_version",
    "task_type",
    "modules_to_save",
    "r",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "fan_in_fan_out",
    # Where the adapter is attached: the tensor names say the same.
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
}

# The scaling is read; the tensors show use_effective_conv2d, whose cores are refused; the other keys concern training and initial values.
_LYCORIS = _EVERY_METHOD | {
    "alpha",
    "rank_dropout",
    "module_dropout",
    "init_weights",
    "use_effective_conv2d",
}

KNOWN_KEYS = {
    # Read: the scaling; initialisations; whether the adapter has magnitudes, or biases beside lora_B; the rows of trained tokens;
    # parameters with factors of their own; whether a tied head gets the embedding's delta; the order of lora_B's columns for stacked
    # experts. The rest: training; options of an initialisation, of megatron_config and of use_qalora; where PEFT keeps the factors at run
    # time, and whether PEFT before 0.3 kept the model merged at run time.
    "LORA": _EVERY_METHOD
    | {rule.key for rule in RULES if rule.method == "LORA"}
    | {
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "trainable_token_indices",
        "target_parameters",
        "ensure_weight_tying",
        LAYOUT_KEY,
        LAYOUT_DETAILS,
        "lora_dropout",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "merge_weights",
    },
    "LOHA": _LYCORIS,
    # The shapes show how w1 and w2 are decomposed.
    "LOKR": _LYCORIS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
    # AdaLoRA's config has all of LoRA's keys but reads only some; keys that PEFT refuses or ignores for AdaLoRA are omitted here. Of its
    # own keys only init_r is read, for the scaling; the others are used only in training.
    "ADALORA": _EVERY_METHOD
    | {
        "lora_alpha",
        "lora_dropout",
        "trainable_token_indices",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
        "init_lora_weights",
        "init_r",
        "target_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
    },
    # Read: that the file holds the projections; their seed is then not needed.
    "VERA": _EVERY_METHOD
    | {"save_projection", "projection_prng_key", "vera_dropout", "d_initial", "init_weights"},
    # Read: constrained rotations with their bound, and the series with its number of terms. The shapes show the blocks.
    "OFT": _EVERY_METHOD
    | {
        "coft",
        "eps",
        "use_cayley_neumann",
        "num_cayley_neumann_terms",
        "oft_block_size",
        "block_share",
        "module_dropout",
        "init_weights",
    },
    # Read: how HRA's vectors are used; MiSS's kind. The rest: initial values, whose results the tensors hold.
    "MISS": _EVERY_METHOD | {"miss_dropout", "mini_r", "init_weights"},
    "SHIRA": _EVERY_METHOD | {"mask_type", "random_seed", "init_weights"},
    "DELORA": _EVERY_METHOD | {"delora_lambda", "lambda_pattern", "module_dropout", "init_weights"},
    "HRA": _EVERY_METHOD | {"apply_GS", "init_weights"},
    # Read: the number of factors; only 1 is supported. The shapes show the blocks.
    "BOFT": _EVERY_METHOD
    | {
        "boft_n_butterfly_factor",
        "boft_block_size",
        "boft_block_num",
        "boft_dropout",
        "init_weights",
    },
}
"""Known keys by PEFT's name of the method."""

OTHER_LIBRARIES = "LyCORIS (LoHa, LoKr), MLX, ComfyUI or old versions of diffusers"

_OTHERS = re.compile(
    r"^lora_\w+\.(?:hada|lokr)_w|\.lora_[ab]$|^(?:lora_|diffusion_model\.|(?:unet|transformer(?!\.h\.)|text_encoder\w*)\.).*"
    r"(?:lora_[AB]|down|up)\.weight$"
)
"""Names of tensors in LoRA files of these libraries, of kohya and of diffusers; GPT-2's layers are named ``transformer.h``."""


def refuse_kinds(config: AdapterConfig) -> None:
    """Raise `UnsupportedError` with all reasons if the config shows an unsupported kind of adapter."""
    if reasons := refusals(config):
        raise UnsupportedError(f"{config.path}: refused: {listed(reasons, separator='; ')}")


def refusals(config: AdapterConfig) -> list[str]:
    """Return the reasons to refuse an adapter with this config, one phrase each; empty if it is supported."""
    kind = config.peft_type
    if not isinstance(kind, str) or kind not in KNOWN_KEYS:
        return [f"{kind} adapter: {_NOT_KNOWN}; {INSTEAD}"]
    fitting = (
        f"{rule.kind}: {rule.reason}"
        for rule in RULES
        if rule.method == kind
        and rule.key in config.values
        and rule.applies(config.get(rule.key))
        and not (rule.kind == RESIDUAL and config.stated.base_is_residual)
    )
    reasons = [*dict.fromkeys(fitting)]
    if reasons:
        reasons[-1] += f"; {INSTEAD}"
    if kind == "LORA":
        reasons += layout_refusals(config)
    # PEFT would drop these keys and read the adapter without them.
    if unknown := [key for key in unknown_keys(config) if key not in config.stated.ignore_keys]:
        what = listed(f"{quoted(key, 30)} ({quoted(config.values[key], 30)})" for key in unknown)
        keys = "keys" if len(unknown) > 1 else "key"
        reasons.append(
            f"unknown {keys} {what}, which may change the delta; pass --ignore-key KEY if KEY does not"
        )
    return reasons


def unknown_keys(config: AdapterConfig) -> list[str]:
    """List the nonempty keys of a config that are not known, whether or not the user ignores them."""
    known = KNOWN_KEYS.get(config.peft_type, set())
    others = ((key, value) for key, value in config.values.items() if key not in known)
    return [key for key, value in others if value is not False and value not in (None, "", [], {})]


def is_residual(config: AdapterConfig) -> bool:
    """Test whether an adapter with this config is relative to a residual of its base."""
    return any(rule.kind == RESIDUAL and rule.applies(config.get(rule.key)) for rule in RULES)


def version_notes(config: AdapterConfig) -> Iterator[str]:
    """Warn of what PEFT computed otherwise before 0.18, from which on configs state the version that trained them."""
    if config.get("peft_version"):
        return
    says = "the config states no peft_version; if PEFT {} trained the adapter, this result differs: {} meant something else"
    patterns = f"{config.get('rank_pattern')} {config.get('alpha_pattern')}"
    if config.peft_type == "LORA" and re.search(r"[|^]", patterns):
        yield says.format("up to 0.14", "'|' and '^' in rank_pattern and alpha_pattern")
    terms = config.get("num_cayley_neumann_terms")
    if config.peft_type == "OFT" and config.get("use_cayley_neumann") and terms not in (1, 2):
        yield says.format("before 0.18", "num_cayley_neumann_terms")


def mitigated_before(metadata: Mapping[str, str]) -> list[str]:
    """Note if `mitigate` made the adapter, by the metadata of its file: any λ other than 1 would scale its intruders twice."""
    try:
        made = json.loads(metadata.get("streamer", ""))
        mitigated = made["command"] == "mitigate" and made["lambda"] != 1
        how = f"by `streamer mitigate` with method {made['method']}"
    except (KeyError, TypeError, ValueError, RecursionError):
        return []  # written by another program
    if not mitigated:
        return []
    return [
        f"the adapter is mitigated already, {how}: lambda 1 leaves it unchanged, any other is applied in addition"
    ]


def refuse_other_formats(path: Path) -> None:
    """Refuse LoRA files of other libraries; `path` is a safetensors file, or a directory with some.

    Raises
    ------
    UnsupportedError
        If a file is in another format. Files that are not safetensors are skipped.
    """
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with contextlib.suppress(MissingInputError, FormatError):
            if any(_OTHERS.search(info.name) for info in TensorFile(file).header.tensors):
                instead = f"if of {OTHER_LIBRARIES}, convert it; if kohya's or diffusers', name the one file, with a pipeline as the base"
                raise UnsupportedError(f"{file}: refused: another library's LoRA; {instead}")
