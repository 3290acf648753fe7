"""Between families: ViT to CNN, and Swin to RIFormer."""
