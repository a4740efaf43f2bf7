"""Keys of ``adapter_config.json`` that are known, by what they say or why they leave the delta alone.

Any other key may change what the tensors mean, and is refused unless it is empty or the user insists. A new key is a new entry here,
under the reason that it has, or, if it does change the delta, a rule in `config_rules`.
"""

from __future__ import annotations

LAYOUT_KEY, LAYOUT_DETAILS = "lora_B_layout", "unsloth_fused_expert_lora"

_EVERY_METHOD = {
    # Read: the method; the orientation of square experts, by the version; the class of a merged model, by the task; modules that are
    # saved whole; ranks and scalings; which biases are saved; whether the base stores (in, out).
    "peft_type", "peft_version", "task_type", "modules_to_save", "r", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out",
    # The name of the base, its revision on the hub, and the class that PEFT wrapped.
    "base_model_name_or_path", "revision", "auto_mapping",
    # Where the adapter was put: the names of its tensors say so.
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    # Whether the adapter stays frozen when it is loaded.
    "inference_mode",
    # Written by trainers: Unsloth corrected the base's tokenizer; the dtype and the learning rates of ms-swift.
    "unsloth_fixed", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
}  # fmt: skip

_LORA = {
    # Read: the scaling; initialisations, of which those that change the base have a rule; whether there are magnitudes, and biases
    # beside lora_B; the rows of trained tokens; parameters with factors of their own; a tied head that gets the embedding's delta; the
    # order of lora_B's columns for stacked experts, of all parameters and of each.
    "lora_alpha", "use_rslora", "init_lora_weights", "use_dora", "lora_bias", "trainable_token_indices", "target_parameters",
    "ensure_weight_tying", LAYOUT_KEY, LAYOUT_DETAILS,
    # Used in training alone.
    "lora_dropout",
    # Options of an initialisation.
    "eva_config", "corda_config", "lora_ga_config",
    # For megatron_config and use_qalora alone, which have rules.
    "megatron_core", "qalora_group_size",
    # Where PEFT keeps the factors as it runs, and whether PEFT before 0.3 kept the model merged as it ran.
    "runtime_config", "merge_weights",
}  # fmt: skip

# The scaling is read; the shapes of the tensors say use_effective_conv2d; the rest is of training and of how the tensors began.
_LYCORIS = {"alpha", "rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"}

KNOWN_KEYS = {
    "LORA": _EVERY_METHOD | _LORA,
    "LOHA": _EVERY_METHOD | _LYCORIS,
    # The shapes say how w1 and w2 are decomposed.
    "LOKR": _EVERY_METHOD | _LYCORIS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
    # AdaLoRA's config has all keys of LoRA's: it reads some, and those that PEFT refuses or ignores for it are left out here. Of its own
    # init_r is read, for the scaling; the others are used in training alone.
    "ADALORA": _EVERY_METHOD | {
        "lora_alpha", "lora_dropout", "trainable_token_indices", "runtime_config", "megatron_core", "qalora_group_size",
        "init_lora_weights", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"},
    # Read: that projections are in the file, so that their seed is spare.
    "VERA": _EVERY_METHOD | {"save_projection", "projection_prng_key", "vera_dropout", "d_initial", "init_weights"},
    # Read: constrained rotations with their bound, and the series with its terms. The shapes say the blocks.
    "OFT": _EVERY_METHOD | {
        "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms", "oft_block_size", "block_share", "module_dropout", "init_weights"},
    # Read: the factors, of which only 1 is supported. The shapes say the blocks.
    "BOFT": _EVERY_METHOD | {"boft_n_butterfly_factor", "boft_block_size", "boft_block_num", "boft_dropout", "init_weights"},
}  # fmt: skip
"""PEFT's name of a method → its keys."""
