"""What other tools call the settings: TRL and transformers, axolotl, LLaMA-Factory, and the DPO
reference code. Read where an unknown key is reported, and by `dpo-run convert`.
"""

from __future__ import annotations

# Their key -> ours, with the same meaning of the value.
SAME = {
    **dict.fromkeys(("learning_rate", "lr"), "optim.lr"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs"), "train.epochs"),
    "max_steps": "train.max_steps",
    **dict.fromkeys(("beta", "pref_beta", "rl_beta", "dpo_beta", "kto_beta", "orpo_alpha",
                     "loss.beta"), "stage.beta"),
    **dict.fromkeys(("label_smoothing", "dpo_label_smoothing", "loss.label_smoothing"),
                    "stage.label_smoothing"),
    **dict.fromkeys(("rpo_alpha", "pref_ftx", "dpo_ftx"), "stage.nll_weight"),
    "simpo_gamma": "stage.simpo_gamma",
    "ld_alpha": "stage.ld_alpha",
    "discopop_tau": "stage.discopop_tau",
    "desirable_weight": "stage.desirable_weight",
    "undesirable_weight": "stage.undesirable_weight",
    **dict.fromkeys(("kto_chosen_weight", "kto_desirable_weight"), "stage.desirable_weight"),
    **dict.fromkeys(("kto_rejected_weight", "kto_undesirable_weight"), "stage.undesirable_weight"),
    "output_dir": "run_dir",
    "seed": "seed",
    **dict.fromkeys(("max_length", "cutoff_len", "sequence_len"), "data.max_length"),
    "max_prompt_length": "data.max_prompt_length",
    "model_revision": "model.revision",
    "dataset_config": "data.hub_config",
    "dataset_train_split": "data.train_split",
    "dataset_test_split": "data.eval_split",
    **dict.fromkeys(("val_size", "val_set_size", "test_split_ratio", "n_eval_examples"),
                    "data.eval_rows"),
    "max_samples": "data.max_rows",
    "warmup_ratio": "optim.warmup_ratio",
    "warmup_steps": "optim.warmup_steps",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.max_grad_norm",
    "adam_epsilon": "optim.eps",
    "save_steps": "train.save_every_steps",
    **dict.fromkeys(("eval_steps", "eval_every"), "train.eval_every_steps"),
    "logging_steps": "train.log_every_steps",
    "save_total_limit": "train.keep_checkpoints",
    **dict.fromkeys(("lora_r", "lora_rank"), "lora.r"),
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    **dict.fromkeys(("use_rslora", "peft_use_rslora"), "lora.use_rslora"),
    **dict.fromkeys(("use_dora", "peft_use_dora"), "lora.use_dora"),
    "lora_modules_to_save": "lora.modules_to_save",
    "wandb_project": "logger.wandb_project",
    "router_aux_loss_coef": "train.router_aux_loss_coef",
}  # fmt: skip

# Their key -> what stands for it here, where the value must be converted.
CHANGED = {
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size", "batch_size",
                     "gradient_accumulation_steps"),
                    "train.batch_size, the examples of a whole step, over all devices"),
    **dict.fromkeys(("loss_type", "pref_loss", "loss"), "stage.loss"),
    "rl": "stage",
    "stage": "stage",
    "f_divergence_type": "stage.divergence",
    **dict.fromkeys(("model_name_or_path", "base_model", "model.name_or_path"),
                    "model.path (a folder) or model.hub_id"),
    "model.archive": "model.path",
    **dict.fromkeys(("ref_model", "reference_model", "ref_model_name_or_path"), "stage.reference"),
    **dict.fromkeys(("dataset_name", "dataset", "datasets"), "data.path or data.hub_id"),
    "dataset_dir": "data.path",
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), "optim.schedule"),
    **dict.fromkeys(("optim", "optimizer"), "optim"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "optim.betas"),
    **dict.fromkeys(("use_peft", "finetuning_type", "adapter", "load_in_4bit", "load_in_8bit",
                     "quantization_bit"), "lora=lora, lora=qlora or lora=int8"),
    **dict.fromkeys(("lora_target", "lora_target_modules", "lora_target_linear"),
                    "lora.target_modules"),
    **dict.fromkeys(("bf16", "fp16", "dtype", "torch_dtype", "policy_dtype"), "hardware.precision"),
    "gradient_checkpointing": "hardware.activation_checkpointing",
    "report_to": "logger.wandb, logger.tensorboard",
    "truncation_mode": "data.keep_prompt",
    "trust_remote_code": "model.trust_remote_code",
    "resume_from_checkpoint": "dpo-run resume=<run folder>",
}  # fmt: skip

# Their key -> why nothing stands for it here.
WITHOUT = {
    **dict.fromkeys(("precompute_ref_log_probs", "precompute_ref_batch_size", "ref_model_sync"),
                    "the reference's log-probs are computed once and cached"),
    **dict.fromkeys(("packing", "sample_packing", "pad_to_sequence_len", "padding_free",
                     "eval_sample_packing", "group_by_length"),
                    "every pack is one sequence without padding"),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size", "auto_find_batch_size",
                     "use_liger_kernel", "use_logits_to_keep", "max_num_worker"),
                    "memory decides, see train.micro_batch_tokens"),
    **dict.fromkeys(("attn_implementation", "flash_attention", "flash_attn", "flash_attention_2",
                     "xformers_attention"), "model.attention=auto takes the fastest that is exact"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "ddp_timeout", "trainer",
                     "ddp_find_unused_parameters"), "hardware.devices=N shards by FSDP2"),
    **dict.fromkeys(("template", "chat_template", "special_tokens"),
                    "the model's chat template is used; another: data.chat_template=<Jinja file>"),
    **dict.fromkeys(("preprocessing_num_workers", "dataset_num_proc", "dataloader_num_workers",
                     "dataset_processes", "overwrite_cache", "dataset_prepared_path"),
                    "rows are encoded once and cached"),
    **dict.fromkeys(("do_train", "do_eval", "eval_strategy", "evaluation_strategy",
                     "save_strategy", "logging_strategy", "logging_first_step", "plot_loss",
                     "include_num_input_tokens_seen"), "training, evaluation and plots are on"),
    **dict.fromkeys(("overwrite_output_dir", "remove_unused_columns", "strict", "tf32",
                     "save_safetensors", "model_type", "tokenizer_type", "train_on_inputs",
                     "gradient_checkpointing_kwargs", "save_only_model"), "not needed"),
    "max_completion_length": "data.max_length limits prompt and response together",
}  # fmt: skip


def counterpart(key: str) -> str | None:
    """What another tool's key is called here, or why it is not needed; None if it is unknown."""
    ours = SAME.get(key) or CHANGED.get(key)
    return f"that is {ours} here" if ours else WITHOUT.get(key)
