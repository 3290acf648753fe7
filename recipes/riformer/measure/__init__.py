"""The paper's measurements: latency of a ViT by operation, receptive fields, affine scales, throughput."""
