"""Make tiny adapters on experts' parameters with the PEFT that is installed, and what that PEFT merges them to, as data for the tests.

    python tools/make_expert_adapters.py tests/data/experts    # in an environment with the version of PEFT that is wanted

PEFT changed which way round lora_A and lora_B of such parameters are: 0.18, 0.19.0 and 0.19.1 differ. Each case is a directory with
``adapter/`` and ``merged.safetensors``; the bases stand beside them, experts' tensors only, under their names on disk.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

HIDDEN = 8
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4, "vocab_size": 16, "num_experts_per_tok": 1, "moe_intermediate_size": HIDDEN, "num_experts": 3, "num_local_experts": 3,
    "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM"),
}
CASES = {
    "both": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "square": ["mlp.experts.down_proj"],
}


def experts(directory: Path) -> dict[str, Any]:
    """The experts' tensors of a saved model."""
    from safetensors.torch import load_file

    return {
        k: v
        for k, v in load_file(directory / "model.safetensors").items()
        if ".experts." in k and "bias" not in k
    }


def make(name: str, out: Path) -> None:
    """The base, if it is not there yet, and every case of one model."""
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

    config, model = (getattr(transformers, n) for n in MODELS[name])
    loader = f"transformers{transformers.__version__.split('.')[0]}"
    base = out / f"base-{name}-{loader}"
    for case, targets in CASES.items():
        torch.manual_seed(0)
        plain = model(config(**SIZES))
        if not base.exists():
            plain.save_pretrained(base)
            kept = experts(base)
            for file in base.iterdir():
                if file.name != "config.json":
                    file.unlink()
            save_file(kept, base / "model.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lora = peft.LoraConfig(
                r=2, target_modules=[], target_parameters=targets, init_lora_weights=False
            )
            adapted = peft.get_peft_model(plain, lora)
        place = out / f"{name}-{case}-peft{peft.__version__}-{loader}"
        adapted.save_pretrained(place / "adapter")
        (place / "adapter" / "README.md").unlink(missing_ok=True)
        adapted.merge_and_unload().save_pretrained(place / "merged")
        save_file(experts(place / "merged"), place / "merged.safetensors")
        for file in (place / "merged").iterdir():
            file.unlink()
        (place / "merged").rmdir()


def main() -> int:
    """Make all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory to write to")
    parser.add_argument(
        "--models", default=",".join(MODELS), help="which models (default: %(default)s)"
    )
    args = parser.parse_args()
    for name in args.models.split(","):
        make(name, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
