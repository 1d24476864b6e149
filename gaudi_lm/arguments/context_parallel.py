"""Context parallelism: ranks side by side that take the same rows, and each a part of the tokens of every row.

optimum-habana has it by DeepSpeed's Ulysses (Jacobs et al. 2023): attention exchanges tokens for heads among the ranks
of a group, and everything else sees its own tokens alone.
"""

from __future__ import annotations

import os

from gaudi_lm.errors import UserError


def data_ranks(args) -> tuple[int, int]:
    """Which share of the rows this rank takes, and how many shares there are."""
    return args.process_index // args.context_parallel_size, args.world_size // args.context_parallel_size


def sequence_part(args) -> tuple[int, int]:
    """Which part of each row this rank takes, and in how many parts rows are cut."""
    return args.process_index % args.context_parallel_size, args.context_parallel_size


def check_context_parallel(args) -> None:
    """Refuse what a group of ranks cannot do together.

    Args:
        args: :class:`gaudi_lm.arguments.definitions.LMTrainingArguments`, before its own defaults are resolved.

    Raises:
        UserError: see the message.
    """
    size = args.context_parallel_size
    if size == 1:
        return
    flag = f"--context_parallel_size {size}"
    if not args.deepspeed:
        raise UserError(f"{flag} needs --deepspeed, whose attention exchanges the parts of rows")
    if args.attn_implementation != "gaudi_fused_sdpa" or not args.flash_attention_causal_mask:
        raise UserError(
            f"{flag} needs --attn_implementation gaudi_fused_sdpa --flash_attention_causal_mask True: no other "
            "attention sees the whole row"
        )
    if args.generate:
        raise UserError(f"{flag} cannot be combined with --generate")
    if args.neftune_noise_alpha:
        raise UserError(
            f"{flag} cannot be combined with --neftune_noise_alpha: its noise depends on the length of a row"
        )
    if not args.average_tokens_across_devices:
        raise UserError(f"{flag}: parts of a row have one loss; leave out --average_tokens_across_devices False")
    started = int(os.environ.get("WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))
    ranks = args.dry_run_cards or started
    if ranks % size:
        number = "--dry_run_cards" if args.dry_run and started == 1 else "--world_size of gaudi_spawn.py"
        raise UserError(f"{flag} does not divide the number of ranks, {ranks} ({number})")
