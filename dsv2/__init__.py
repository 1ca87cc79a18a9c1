"""dsv2: pretraining of DeepSeek-V2-style models (Multi-head Latent Attention + DeepSeekMoE)."""
