"""List the known keys of ``adapter_config.json``, grouped by what they mean or why they do not affect the delta.

Any other key may change what the tensors mean, so it is refused unless it is empty or the user insists. Add a new key here under its
reason, or as a rule in `config_rules` if it changes the delta.
"""

from __future__ import annotations

LAYOUT_KEY, LAYOUT_DETAILS = "lora_B_layout", "unsloth_fused_expert_lora"

NEUTRAL = {
    # The name of the base, its revision on the hub, and the class that PEFT wrapped.
    "base_model_name_or_path", "revision", "auto_mapping",
    # Whether the adapter stays frozen when it is loaded.
    "inference_mode",
    # Written by trainers: Unsloth's mark that it corrected the base's tokenizer; ms-swift's dtype and learning rates.
    "unsloth_fixed", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
}  # fmt: skip
"""Keys that say nothing of the delta."""

_EVERY_METHOD = NEUTRAL | {
    # Read: the method; the orientation of square experts, by version; the class of a merged model, by task; modules saved whole; ranks and
    # scalings; which biases are saved; whether the base stores (in, out).
    "peft_type", "peft_version", "task_type", "modules_to_save", "r", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out",
    # Where the adapter is attached: the tensor names say the same.
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip

_LORA = {
    # Read: the scaling; initialisations (a rule covers those that change the base); whether the adapter has magnitudes, or biases beside
    # lora_B; the rows of trained tokens; parameters with factors of their own; whether a tied head gets the embedding's delta; the order
    # of lora_B's columns for stacked experts, globally and for each parameter.
    "lora_alpha", "use_rslora", "init_lora_weights", "use_dora", "lora_bias", "trainable_token_indices", "target_parameters",
    "ensure_weight_tying", LAYOUT_KEY, LAYOUT_DETAILS,
    # Used only in training.
    "lora_dropout",
    # Options of an initialisation.
    "eva_config", "corda_config", "lora_ga_config",
    # Used only with megatron_config and use_qalora, which have rules.
    "megatron_core", "qalora_group_size",
    # Where PEFT keeps the factors at run time, and whether PEFT before 0.3 kept the model merged at run time.
    "runtime_config", "merge_weights",
}  # fmt: skip

# The scaling is read; the tensor shapes show use_effective_conv2d; the other keys concern training and initial values.
_LYCORIS = {"alpha", "rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"}

KNOWN_KEYS = {
    "LORA": _EVERY_METHOD | _LORA,
    "LOHA": _EVERY_METHOD | _LYCORIS,
    # The shapes show how w1 and w2 are decomposed.
    "LOKR": _EVERY_METHOD | _LYCORIS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
    # AdaLoRA's config has all of LoRA's keys but reads only some; keys that PEFT refuses or ignores for AdaLoRA are omitted here. Of its
    # own keys only init_r is read, for the scaling; the others are used only in training.
    "ADALORA": _EVERY_METHOD | {
        "lora_alpha", "lora_dropout", "trainable_token_indices", "runtime_config", "megatron_core", "qalora_group_size",
        "init_lora_weights", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"},
    # Read: that the file holds the projections; their seed is then not needed.
    "VERA": _EVERY_METHOD | {"save_projection", "projection_prng_key", "vera_dropout", "d_initial", "init_weights"},
    # Read: constrained rotations with their bound, and the series with its number of terms. The shapes show the blocks.
    "OFT": _EVERY_METHOD | {
        "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms", "oft_block_size", "block_share", "module_dropout", "init_weights"},
    # Read: the number of factors; only 1 is supported. The shapes show the blocks.
    "BOFT": _EVERY_METHOD | {"boft_n_butterfly_factor", "boft_block_size", "boft_block_num", "boft_dropout", "init_weights"},
}  # fmt: skip
"""Known keys by PEFT's name of the method."""
