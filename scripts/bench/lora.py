"""The same adapter on both sides: settings, quantization and initial weights.

LoRA's B starts at zero and its A is random: the first losses are equal for any A, later ones only
for equal A. So dpo-run draws A once, and it is copied into the other side's model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.bench.job import Job

LORA = ("none", "lora", "qlora")
SEED = 0  # of dpo-run's runs, which decides its A


def alpha(r: int) -> int:
    return 2 * r


def lora_overrides(job: Job) -> list[str]:
    """Overrides of dpo-run."""
    if job.lora == "none":
        return []
    return [f"lora={job.lora}", f"lora.r={job.r}", f"lora.alpha={alpha(job.r)}", f"seed={SEED}"]


def save_start(model_folder: str, r: int, folder: Path) -> None:
    """Save the initial adapter of a dpo-run run in PEFT's layout.

    A depends only on the seed and the layers' sizes, so the base weights are never read, and
    untouched memory is never allocated.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dpo_cli.config import LoraConfig, ModelConfig
    from dpo_cli.model.adapters import lora
    from dpo_cli.model.adapters.active import POLICY_TASK
    from dpo_cli.model.source import origin_of

    settings = LoraConfig(name="lora", r=r, alpha=float(alpha(r)))
    origin = origin_of(ModelConfig(path=model_folder))
    config = AutoConfig.from_pretrained(model_folder)
    with torch.device("meta"):  # in float32, as PEFT rounds A to what is under it
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to_empty(device="cpu")
    lora.add_adapter(model, lora.adapter_config(settings, origin, POLICY_TASK), None, SEED)
    lora.save_adapter(model, folder)


def trainer_arguments(job: Job) -> dict[str, Any]:
    """Arguments of TRL's trainers: LoRA on every linear layer, over dense or NF4 weights."""
    if job.lora == "none":
        return {}
    import peft

    config = peft.LoraConfig(
        r=job.r, lora_alpha=alpha(job.r), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return {"peft_config": config, **quantization(job)}


def quantization(job: Job) -> dict[str, Any]:
    if job.lora != "qlora":
        return {}
    import bitsandbytes
    import torch
    import transformers

    if job.device == "cpu":
        # An evaluation there, such as TRL's pass over the reference, would repack the 4-bit
        # weights for good, and gradients would no longer pass.
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    return {
        "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    }  # fmt: skip


def start_equal(model: Any, job: Job) -> None:
    """Copy the initial weights into TRL's model, in the dtype that TRL chose for them.

    TRL rounds adapters on quantized weights to bf16; in a float32 comparison they are converted
    back to float32.
    """
    if job.lora == "none":
        return
    import peft
    from safetensors.torch import load_file

    if job.precision == "fp32":
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
    state = load_file(Path(job.adapter) / "adapter_model.safetensors")
    loaded = peft.set_peft_model_state_dict(model, state)
    missing = [key for key in loaded.missing_keys if "lora_" in key]
    assert not missing, missing
    assert not loaded.unexpected_keys, loaded.unexpected_keys
