from habana_frameworks.torch.hpex.experimental.transformer_engine.recipe import DelayedScaling, Format

__all__ = ["DelayedScaling", "Format"]
