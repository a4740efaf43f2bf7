"""The tables of what is supported, made from the registries: kinds of adapters, and encodings of bases. docs/support.md holds copies."""

from __future__ import annotations

from typing import NamedTuple

from streamer.adapters.adapter_config import OTHER_LIBRARIES, RESIDUAL, RULES
from streamer.adapters.modules import PEFT_METHODS
from streamer.weights.codes import Recodable
from streamer.weights.logical import FORMATS, QuantizationFormat


class Support(NamedTuple):
    """What each route does with a kind of adapter."""

    kind: str
    detect: str
    mitigate: str
    merge: str


LORA = (
    Support(
        "LoRA on linear layers; rsLoRA, `rank_pattern`, `alpha_pattern`, Conv1D, with any `fan_in_fan_out`",
        "yes",
        "yes",
        "yes",
    ),
    Support(
        "LoRA on embeddings, and on 1-d to 3-d convolutions without groups", "yes", "yes", "yes"
    ),
    Support(
        "LoRA on experts and other stacked parameters (`target_parameters`), stored as a stack or as one tensor per expert",
        "yes, expert by expert",
        "yes",
        "yes",
    ),
    Support(
        "LoRA of a diffusers pipeline, in diffusers' or kohya's form ([below](#diffusers-pipelines))",
        "yes",
        "yes, in its own form",
        "yes",
    ),
    Support(
        "DoRA on layers, embeddings and convolutions",
        "on the effective weight",
        "with `--to-lora RANK`; else refused",
        "yes",
    ),
    Support(
        "`modules_to_save`, `bias`, `lora_bias`, saved or resized embeddings, `trainable_token_indices`",
        "not judged",
        "copied, bit for bit",
        "applied; new tensors are added, `vocab_size` is set",
    ),
    Support(
        "LoRA on a tied head or embedding, of any name; refused for models like T5, which no config can untie",
        "yes",
        "yes",
        "unties them in the config if they differ",
    ),
)

EXPERTS = Support(
    "a fully fine-tuned mixture with stacks of experts, of a class that transformers has",
    "expert by expert",
    "with `--to-lora RANK` if no expert changed; else refused",
    "yes",
)


def support_table() -> str:
    """The table in Markdown."""
    refused = ", ".join(
        dict.fromkeys(
            rule.kind for rule in RULES if rule.kind != RESIDUAL and rule.method == "LORA"
        )
    )
    methods = ", ".join(method.title for method in PEFT_METHODS.values())
    flag = "with `--base-is-residual`"
    rows = [
        Support("kind of adapter", "`detect`", "`mitigate`", "`merge`"),
        Support(*["---"] * 4),
        *LORA,
        Support(
            "residual-base initialisations: PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ", flag, flag, flag
        ),
        Support(methods, "on the effective weight", "with `--to-lora RANK`; else refused", "yes"),
        EXPERTS,
        Support(
            f"refused, with the reason: {refused}; LoHa and LoKr with cores (`use_effective_conv2d`); MiSS with `mini`; other "
            f"methods; LoRA files of {OTHER_LIBRARIES}; adapters saved as pickles",
            "no",
            "no",
            "no",
        ),
    ]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _merged(one: QuantizationFormat) -> str:
    codes = issubclass(getattr(one.make, "__self__", object), Recodable)
    return (
        "encoded again, or " if one.requantizes else "`--requantize MAP`, or " if codes else ""
    ) + "`--dequantize`"


def encodings_table() -> str:
    """The rows of the bases' table in Markdown: encoding, tensors on disk, what `detect` and `mitigate` do, what `merge` does."""
    rows = [
        ("BF16, F16, F32, F64", "`weight`", "read", "written, rounded once"),
        *(
            (
                one.title,
                one.stored,
                "read",
                _merged(one),
            )
            for one in FORMATS
        ),
    ]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
