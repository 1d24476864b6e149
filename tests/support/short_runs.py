"""Flags of short runs that several test files begin with."""

GPT2 = "n_embd=32,n_layer=2,n_head=2,n_positions=128,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0"
# Flags of each kind of adapter.
ADAPTERS = {
    "lora": ["--lora_target_modules", "all-linear", "--train_on_inputs", "False"],
    "adalora": ["--adalora_tinit", "2", "--adalora_tfinal", "4", "--adalora_delta_t", "1", "--pad_to_max_length"],
    "ia3": ["--ia3_target_modules", "k_proj", "v_proj", "down_proj", "--feedforward_modules", "down_proj"],
    "vera": ["--vera_target_modules", "q_proj", "v_proj", "--dataset_concatenation"],
    "ln_tuning": ["--ln_target_modules", "input_layernorm", "norm", "--chat_prompt", "--train_on_inputs", "False"],
    "llama-adapter": ["--adapter_layers", "2", "--adapter_len", "4"],
}


def scratch(assets, output, *more) -> list:
    """Flags of a small GPT-2 from scratch on the CPU."""
    return [
        "--model_type", "gpt2", "--tokenizer_name", assets.tokenizer, "--config_overrides", GPT2,
        "--train_file", assets.train, "--validation_file", assets.validation, "--output_dir", output,
        "--per_device_train_batch_size", 8, "--per_device_eval_batch_size", 4, "--block_size", 64,
        "--logging_steps", 1, "--use_cpu", *more,
    ]  # fmt: skip


def common(instructions, output, *more) -> list[str]:
    """Flags of a run of run_lora_clm.py on a tiny Llama."""
    flags = [
        "--model_name_or_path", instructions.llama, "--train_file", instructions.train, "--validation_file",
        instructions.validation, "--output_dir", output, "--max_seq_length", 128, "--max_train_samples", 24,
        "--max_eval_samples", 10, "--per_device_train_batch_size", 4, "--logging_steps", 1, "--seed", 3, *more,
    ]  # fmt: skip
    return list(map(str, flags))
