"""What installed packages call and the simulated card lacks. `tests/simulator/test_names.py` holds it against them."""

_HABANA = "habana_frameworks.torch."
_WITHOUT = "AttributeError on the first call"

ABSENT = {
    _HABANA + "hpex.kernels.CTCLoss": "Wav2Vec2 takes PyTorch's own CTC loss, and prints so",
    _HABANA + "hpex.kernels.CTCLoss.apply": "as CTCLoss",
    _HABANA
    + "hpex.kernels.Fp8Ops.cast_to_fp8_v2": "ChatGLM and GLM-4V with an FP8 cache: ImportError on the first call",
    _HABANA + "hpex.kernels.RotaryPosEmbeddingMode": "Wan of diffusers: ImportError on the first call",
    _HABANA + "hpex.kernels.RotaryPosEmbeddingMode.PAIRWISE": "as RotaryPosEmbeddingMode",
    _HABANA + "hpex.kernels.apply_rotary_pos_emb": "as RotaryPosEmbeddingMode",
    _HABANA + "hpu.graphs.CachedParams": f"graphs of diffusers' pipelines (--use_hpu_graphs there): {_WITHOUT}",
    _HABANA + "hpu.graphs.copy_to": "as CachedParams",
    _HABANA + "hpu.graphs.input_hash": "as CachedParams",
    "intel_transformer_engine.LayerNorm": "accelerate takes torch.nn.LayerNorm in its place, as on a card",
    "intel_transformer_engine.TransformerLayer": "accelerate asks for it on NVIDIA only",
    "torch.ops.hpu.cast_from_fp8": f"DeepSpeed's FP8 quantisation of parameters and gradients: {_WITHOUT}",
    "torch.ops.hpu.cast_to_fp8_v2": f"DeepSpeed's FP8 quantisation of parameters and gradients: {_WITHOUT}",
    "torch.ops.hpu.cast_to_fp8_just_in_time": f"checkpoints that are FP8 by blocks (DeepSeek-V3): {_WITHOUT}",
    "torch.ops.hpu.fp8_gemm_v2": f"checkpoints that are FP8 by blocks (DeepSeek-V3): {_WITHOUT}",
    "torch.ops.hpu.convert_from_uint4": f"AWQ checkpoints: {_WITHOUT}",
    "torch.ops.hpu.rotary_pos_embedding": f"image models of diffusers: {_WITHOUT}",
    "torch.ops.hpu.rotary_pos_embedding_backward": f"image models of diffusers: {_WITHOUT}",
    "torch.ops.hpu.softmax_fp8": f"attention of Falcon and diffusers quantised by INC: {_WITHOUT}",
}


def report() -> str:
    """One line a name, with what happens where it is used."""
    names = {name: name.removeprefix(_HABANA) for name in ABSENT}
    width = max(map(len, names.values()))
    return "".join(f"  {names[name]:{width}}  {meaning}\n" for name, meaning in ABSENT.items())
