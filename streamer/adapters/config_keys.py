"""Keys of ``adapter_config.json`` that are known, each with what it says or why it leaves the delta alone.

Any other key may change what the tensors mean, and is refused unless it is empty or the user insists. A new key is a new entry here,
or, if it does change the delta, a rule in `config_rules`.
"""

from __future__ import annotations

LAYOUT_KEY, LAYOUT_DETAILS = "lora_B_layout", "unsloth_fused_expert_lora"

_EVERY_METHOD = {
    "peft_type": "the method",
    "peft_version": "read: the orientation of square experts follows from it",
    "task_type": "read: the class of a merged model follows from it",
    "base_model_name_or_path": "the name of the base",
    "revision": "the base's revision on the hub",
    "auto_mapping": "the class that PEFT wrapped",
    "inference_mode": "whether the adapter stays frozen when it is loaded",
    "target_modules": "where the adapter was put: the names of its tensors say so",
    "exclude_modules": "as target_modules",
    "layers_to_transform": "as target_modules",
    "layers_pattern": "as target_modules",
    "modules_to_save": "read: modules that are saved whole",
    "r": "read: the rank",
    "rank_pattern": "read: the rank of some modules",
    "alpha_pattern": "read: the scaling of some modules",
    "bias": "read: which biases are saved",
    "fan_in_fan_out": "read: whether the base stores (in, out)",
    # Written by trainers.
    "unsloth_fixed": "Unsloth corrected the base's tokenizer",
    "lora_dtype": "the dtype in which ms-swift trained",
    "lorap_lr_ratio": "a learning rate of ms-swift",
    "lorap_emb_lr": "a learning rate of ms-swift",
}

_LORA = {
    "lora_alpha": "read: the scaling",
    "use_rslora": "read: the scaling",
    "lora_dropout": "used in training alone",
    "init_lora_weights": "read: initialisations that change the base have a rule",
    "eva_config": "options of an initialisation",
    "corda_config": "options of an initialisation",
    "lora_ga_config": "options of an initialisation",
    "use_dora": "read: whether there are magnitudes",
    "lora_bias": "read: whether there are biases beside lora_B",
    "trainable_token_indices": "read: the rows of trained tokens",
    "target_parameters": "read: parameters with factors of their own",
    "ensure_weight_tying": "read: a tied head gets the embedding's delta",
    "runtime_config": "where PEFT keeps the factors as it runs",
    "megatron_core": "a package, for megatron_config alone",
    "qalora_group_size": "for use_qalora alone",
    "merge_weights": "whether PEFT before 0.3 kept the model merged as it ran",
    LAYOUT_KEY: "read: the order of lora_B's columns for stacked experts",
    LAYOUT_DETAILS: "read: the same for each parameter",
}

_TRAINING, _SHAPES, _INIT = "used in training alone", "the shapes of the tensors say so", "how the tensors began"

_LYCORIS = {
    "alpha": "read: the scaling",
    "rank_dropout": _TRAINING,
    "module_dropout": _TRAINING,
    "init_weights": _INIT,
    "use_effective_conv2d": _SHAPES,
}

KNOWN_KEYS: dict[str, dict[str, str]] = {
    "LORA": _EVERY_METHOD | _LORA,
    "LOHA": _EVERY_METHOD | _LYCORIS,
    "LOKR": _EVERY_METHOD | _LYCORIS
    | {"decompose_both": _SHAPES, "decompose_factor": _SHAPES, "rank_dropout_scale": _TRAINING},
    # AdaLoRA's config has all keys of LoRA's: it reads some, and those that PEFT refuses or ignores for it are left out here.
    "ADALORA": _EVERY_METHOD
    | {key: _LORA[key] for key in ("lora_alpha", "lora_dropout", "trainable_token_indices", "runtime_config", "megatron_core",
                                   "qalora_group_size")}
    | {"init_lora_weights": _INIT, "init_r": "read: the scaling"}
    | dict.fromkeys(("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"), _TRAINING),
    "VERA": _EVERY_METHOD
    | {"vera_dropout": _TRAINING, "d_initial": _INIT, "init_weights": _INIT, "save_projection": "read: projections must be in the file",
       "projection_prng_key": "the seed of projections, which are in the file"},
    "OFT": _EVERY_METHOD
    | {"module_dropout": _TRAINING, "init_weights": _INIT, "oft_block_size": _SHAPES, "block_share": _SHAPES,
       "coft": "read: constrained rotations", "eps": "read: their bound", "use_cayley_neumann": "read: the series",
       "num_cayley_neumann_terms": "read: its terms"},
    "BOFT": _EVERY_METHOD
    | {"boft_dropout": _TRAINING, "init_weights": _INIT, "boft_block_size": _SHAPES, "boft_block_num": _SHAPES,
       "boft_n_butterfly_factor": "read: only 1 is supported"},
}  # fmt: skip
"""PEFT's name of a method → key → reason."""
