"""What other programs call our settings, so that `--lr` is answered with `--optimizer.learning-rate`."""

ALIASES = {
    "training.steps": "epochs num_epochs max_steps num_steps total_steps train_steps max_iters iters iterations",
    "training.batch_size": "bs batch global_batch_size train_batch_size per_device_train_batch_size",
    "training.gradient_accumulation": "grad_accum accum gradient_accumulation_steps accumulate_grad_batches",
    "training.compute_dtype": "dtype precision bf16 fp16 mixed_precision",
    "training.seed": "random_seed",
    "training.remat": "checkpointing gradient_checkpointing activation_checkpointing",
    "training.ema_decay": "ema",
    "training.validate_every": "eval_every eval_interval eval_steps val_every val_interval",
    "training.validation_batches": "eval_iters eval_batches",
    "training.sample_prompt": "prompt",
    "optimizer.name": "optimizer optim opt",
    "optimizer.learning_rate": "lr max_lr peak_lr base_lr",
    "optimizer.schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule lr_decay",
    "optimizer.warmup_steps": "warmup warmup_iters num_warmup_steps",
    "optimizer.weight_decay": "wd decay",
    "optimizer.clip_norm": "clip grad_clip gradient_clip gradient_clip_val max_grad_norm clip_grad",
    "optimizer.beta1": "adam_beta1 betas",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "epsilon adam_epsilon",
    "optimizer.final_learning_rate_fraction": "min_lr",
    "data.source": "data dataset dataset_name data_dir data_path train_file corpus input input_file",
    "data.sequence_length": "seq_len seqlen seq_length max_seq_len context ctx context_length block_size",
    "data.validation_fraction": "val_split validation_split val_fraction",
    "model.name": "model arch architecture preset model_name model_type model_name_or_path",
    "model.embed_dim": "d_model dim width hidden hidden_size hidden_dim n_embd",
    "model.num_layers": "layers depth n_layer n_layers num_hidden_layers",
    "model.num_heads": "heads n_head n_heads num_attention_heads",
    "model.mlp_dim": "d_ff ffn_dim intermediate_size",
    "checkpoint.every": "save_every save_steps save_interval ckpt_every checkpoint_every",
    "checkpoint.keep": "save_total_limit keep_last max_to_keep",
    "logging.every": "log_every log_interval logging_steps",
    "device.data": "dp data_parallel data_parallel_size num_devices num_gpus gpus devices",
    "device.tensor": "tp tensor_parallel tensor_parallel_size",
    "device.mesh_shape": "mesh",
    "run_dir": "out output output_dir outdir out_dir work_dir workdir log_dir logdir save_dir resume",
}
"""Our key -> their words for it, where the key is not found by its last part alone."""

MEANT = {alias: key for key, words in ALIASES.items() for alias in words.split()}
"""Their word -> our key."""
