"""Options of MiniMind's scripts and of TRL, with what mm has instead, for the error when one of them is given."""

from collections.abc import Mapping

_SEQUENCES = "--batch-tokens N: sequences per step x accumulation x tokens of each, such as 32 x 8 x 512 = 131072"
OTHER_FLAGS: Mapping[str, str] = {
    **dict.fromkeys(("--n_layers", "--num_hidden_layers"), "--layers N"),
    **dict.fromkeys(("--dim", "--hidden_size"), "--width N"),
    **dict.fromkeys(("--n_heads", "--num_attention_heads"), "--heads N"),
    **dict.fromkeys(("--n_kv_heads", "--num_key_value_heads"), "--kv-heads N"),
    **dict.fromkeys(("--max_seq_len", "--max_seq_length", "--max_length"), "mm pack --max-len N"),
    **dict.fromkeys(("--batch_size", "--accumulation_steps", "--gradient_accumulation_steps"), _SEQUENCES),
    "--per_device_train_batch_size": f"{_SEQUENCES}; --micro-tokens N: what one device runs at once",
    **dict.fromkeys(("--data_path", "--dataset_name"), "--data DIR, a dataset that `mm pack FILE` makes"),
    **dict.fromkeys(
        ("--model_name_or_path", "--from_weight"), "--init RUN, which `mm import` makes of another's model"
    ),
    **dict.fromkeys(
        ("--load", "--load_from", "--weight", "--lora_weight"), "mm chat RUN: a run, a .pth or a Hugging Face directory"
    ),
    "--model_mode": "mm chat RUN, or mm train STAGE: a run knows its stage",
    "--learning_rate": "--lr X",
    "--num_train_epochs": "--epochs N",
    "--max_steps": "--steps N",
    **dict.fromkeys(("--use_wandb", "--wandb_project", "--report_to"), "--log wandb, or another tracker"),
    **dict.fromkeys(("--log_interval", "--logging_steps"), "--log-every N"),
    **dict.fromkeys(("--save_interval", "--save_steps"), "--save-every N"),
    "--eval_steps": "--val-every N",
    **dict.fromkeys(("--grad_clip", "--max_grad_norm"), "--clip X"),
    **dict.fromkeys(("--warmup_iters", "--warmup_steps", "--warmup_ratio"), "--warmup X, a share of the steps"),
    "--lr_scheduler_type": "--schedule NAME",
    **dict.fromkeys(("--out_dir", "--output_dir", "--save_dir", "--save_weight"), "--out RUN"),
    **dict.fromkeys(("--from_resume", "--resume_from_checkpoint"), "--resume"),
    "--gradient_checkpointing": "--checkpoint-activations",
    **dict.fromkeys(("--lora_name", "--lora_r", "--use_peft"), "--lora RANK"),
    **dict.fromkeys(
        ("--dtype", "--bf16", "--fp16"), "leave it out: matrices are multiplied in what the device is made for"
    ),
    **dict.fromkeys(("--ddp", "--local_rank"), "--nproc N, or start mm with torchrun"),
    "--num_workers": "leave it out: a thread reads the batches from the packed dataset",
    "--use_compile": "leave it out: blocks are compiled on CUDA, unless --no-compile is given",
    "--use_moe": "leave it out: mixtures of experts can be imported and asked, not trained",
    **dict.fromkeys(
        ("--history_cnt", "--historys"), "leave it out: --window N tokens of the conversation are remembered"
    ),
    "--max_new_tokens": "--max-new-tokens N",
    "--top_p": "--top-p X",
    "--open_thinking": "--think",
}
