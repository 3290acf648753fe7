"""DeiT: a ViT that learns from a CNN through a distillation token, ICML 2021."""
